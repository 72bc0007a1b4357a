"""Speech to text: what is heard, how it is written down, and the word error rate of a model and its ONNX artifact."""

import json
import wave

import numpy as np
import pytest
import torch
from families import make_tokenizer, save_family
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.manifest import RUN
from llmopt.core.progress import Silent
from llmopt.core.recipe import EvaluationSpec
from llmopt.core.runtime import Session
from llmopt.models.speech import Ear, Speaking, read_sound
from llmopt.pipeline.measuring.asking import EvalOptions
from llmopt.pipeline.measuring.evaluate import evaluate
from llmopt.pipeline.measuring.tasks import TaskOptions
from llmopt.pipeline.transcribing import transcribe
from llmopt.runtimes.transformers_ import Transformers
from msgspec.structs import replace as with_fields
from transformers import WhisperFeatureExtractor

RATE = 16000
SPOKEN = TaskOptions(max_new_tokens=12)


def say(path, seed=0, *, seconds=0.4, rate=RATE, width=2, channels=1):
    """Write a sound: a few tones."""
    generator = np.random.default_rng(seed)
    times = np.arange(int(seconds * rate)) / rate
    sound = sum(np.sin(2 * np.pi * f * times) for f in generator.uniform(100, 3000, 3)) / 4
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        samples = (sound * 32767).astype("<i2") if width == 2 else (sound * 127 + 128).astype("u1")
        file.writeframes(samples.repeat(channels).tobytes())
    return path


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Return a tiny Whisper that hears a second at once, its ONNX artifact, and sounds with texts."""
    root = tmp_path_factory.mktemp("whisper")
    source = save_family("whisper", root / "model", max_source_positions=50)
    make_tokenizer().save_pretrained(source)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(source)
    build(recipe(source, export=("onnx", {})), root / "out")
    rows = []
    for seed in range(6):
        say(root / f"{seed}.wav", seed)
        rows.append({"audio": f"{seed}.wav", "text": "the quick brown fox"})
    (root / "sounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source, root / "out", root / "sounds.jsonl"


def run(path, data, samples):
    made = EvalOptions(str(data), write=samples, samples=SPOKEN)
    report = evaluate(str(path), data=str(data), options=made, reporter=Silent())
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return {row["metric"]: row for row in report["metrics"]}, rows


def test_torch_and_onnx_write_the_same_with_the_same_word_error_rate(whisper, tmp_path):
    source, artifact, data = whisper
    metrics, rows = run(artifact, data, tmp_path / "a.jsonl")
    alone, own = run(source, data, tmp_path / "b.jsonl")
    assert [row["generated"] for row in rows] == [row["generated"] for row in own]
    assert len({row["generated"] for row in rows}) > 1
    edits, words = sum(row["word_edits"] for row in rows), sum(row["words"] for row in rows)
    rate = metrics["word_error_rate"]
    assert words == 24
    assert rate["value"] == rate["source"] == alone["word_error_rate"]["value"] == edits / words
    assert rate["low"] <= rate["value"] <= rate["high"]
    assert metrics["word_error_rate_increase"]["value"] == 0


def test_it_writes_what_transformers_generates(whisper):
    source, _, data = whisper
    session = Transformers().open(source)
    for seed in range(3):
        features = Ear(source).features(data.parent / f"{seed}.wav")
        made = transcribe(session, features, Speaking.of(source, json.loads((source / "config.json").read_text())), 10)
        told = session.model.generate(torch.from_numpy(features), max_new_tokens=10, do_sample=False)[0].tolist()
        assert made == [token for token in told if token not in {3, session.model.generation_config.eos_token_id}]


class Dreaming(Session):
    """Likes tokens in the order 9, 8, 7 …, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def outputs(self, inputs):
        self.asked.append(inputs["decoder_input_ids"][0].tolist())
        return {"logits": np.arange(10, dtype=np.float32)[None, None]}


def test_it_begins_with_language_and_task_and_leaves_out_what_is_never_said(tmp_path):
    said = {"decoder_start_token_id": 1, "lang_to_id": {"<|en|>": 2, "<|de|>": 4}, "task_to_id": {"transcribe": 5}}
    said |= {"no_timestamps_token_id": 6, "suppress_tokens": [9], "begin_suppress_tokens": [8], "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    session = Dreaming()
    speaking = Speaking.of(tmp_path, {"max_target_positions": 7})
    assert transcribe(session, np.zeros((1, 2, 3)), speaking, 99) == [7, 8, 8]
    assert session.asked == [[1], [1, 4, 5, 6], [1, 4, 5, 6, 7], [1, 4, 5, 6, 7, 8]]


def test_sound_is_read_as_it_was_written(tmp_path):
    sound, rate = read_sound(say(tmp_path / "a.wav", channels=2))
    assert (sound.dtype, len(sound), rate) == (np.float32, 6400, RATE)
    assert np.array_equal(sound, read_sound(say(tmp_path / "b.wav"))[0])
    assert 0.3 < abs(sound).max() < 1


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        ({"rate": 8000}, "the model hears 16000"),
        ({"seconds": 1.2}, "longer than the model hears"),
        ({"width": 1}, "no sound that can be read"),
        (None, "no sound that can be read"),
    ],
    ids=["rate", "long", "8 bits", "missing"],
)
def test_a_sound_that_cannot_be_heard_is_refused_with_words(whisper, tmp_path, sound, message):
    if sound is not None:
        say(tmp_path / "a.wav", **sound)
    (tmp_path / "rows.csv").write_text("path,sentence\na.wav,the fox\n")
    with pytest.raises(LlmoptError) as refused:
        run(whisper[0], tmp_path / "rows.csv", tmp_path / "s.jsonl")
    assert message in refused.value.what
    assert refused.value.hint


def test_without_settings_of_its_ears_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no feature extractor"):
        Ear(save_family("whisper", tmp_path / "model"))


def test_a_gate_limits_the_word_error_rate(whisper, tmp_path):
    source, _, data = whisper
    spec = EvaluationSpec(data=str(data), max_new_tokens=4)
    made = recipe(source, export=("onnx", {}))
    build(with_fields(made, gates=("word_error_rate_increase<=20%",), evaluation=(spec,)), tmp_path / "out")
    (gate,) = json.loads((tmp_path / "out" / RUN).read_text())["gates"]
    assert (gate["verdict"], gate["value"]) == ("passed", 0)
