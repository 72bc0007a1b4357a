"""Speech to text: what is heard, how it is written down, and the word error rate of a model and its ONNX artifact."""

import json
import shutil
import struct
import wave

import numpy as np
import pytest
import torch
from families import make_tokenizer, save_family
from helpers import build, recipe
from llmopt.calibration.records import Record
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.manifest import RUN
from llmopt.core.progress import Silent
from llmopt.core.recipe import EvaluationSpec
from llmopt.core.runtime import Session
from llmopt.models.speech import Ear, Speaking, read_sound
from llmopt.pipeline.artifact import read_run
from llmopt.pipeline.batching import BatchingParams
from llmopt.pipeline.cache.store import CacheSettings
from llmopt.pipeline.infer import infer
from llmopt.pipeline.inference import InferOptions
from llmopt.pipeline.measuring import gating
from llmopt.pipeline.measuring.asking import EvalOptions
from llmopt.pipeline.measuring.evaluate import evaluate
from llmopt.pipeline.measuring.tasks import TaskOptions
from llmopt.pipeline.outdated import why_outdated
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.reads import paths_of
from llmopt.pipeline.run import run_plan
from llmopt.pipeline.sound_inference import SoundInference
from llmopt.pipeline.transcribing import Scribe, transcribe
from llmopt.pipeline.versions import own_version, versions
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
        ear = Ear(source)
        features = ear.features(ear.listen(data.parent / f"{seed}.wav"))
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
    sound = read_sound(say(tmp_path / "a.wav", channels=2))
    assert (sound.samples.dtype, len(sound.samples), sound.rate) == (np.float32, 6400, RATE)
    assert np.array_equal(sound.samples, read_sound(say(tmp_path / "b.wav")).samples)
    assert 0.3 < abs(sound.samples).max() < 1
    assert (sound.length, sound.seconds) == (6400, 0.4)


def test_a_sound_that_was_cut_off_is_refused(tmp_path):
    path = say(tmp_path / "a.wav")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(LlmoptError, match="no sound that can be read") as refused:
        read_sound(path)
    assert "1478 of 6400 samples" in refused.value.where


def test_a_sound_from_a_pipe_does_not_know_its_length(tmp_path):
    whole = say(tmp_path / "a.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(whole[:4] + b"\xff" * 4 + whole[8:40] + struct.pack("<I", 0xFFFFFFFF) + whole[44:])
    assert np.array_equal(read_sound(tmp_path / "a.wav").samples, read_sound(tmp_path / "b.wav", 9999).samples)


def test_no_more_is_read_of_a_long_sound_than_was_asked_for(tmp_path):
    sound = read_sound(say(tmp_path / "a.wav", seconds=3), 100)
    assert (len(sound.samples), sound.length) == (100, 3 * RATE)


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


class TestSoundsAreRead:
    """The sounds that test data name are in the list of what a run reads, and so in all that follows from it."""

    @pytest.fixture
    def gated(self, whisper, tmp_path):
        """Return a recipe with a gate on sounds, and the folder of the sounds."""
        source, _, data = whisper
        shutil.copytree(data.parent, tmp_path / "sounds", ignore=shutil.ignore_patterns("model", "out"))
        spec = EvaluationSpec(data=str(tmp_path / "sounds" / data.name), max_new_tokens=4, samples=5)
        made = recipe(source, export=("onnx", {}))
        return with_fields(made, gates=("word_error_rate<=9",), evaluation=(spec,)), tmp_path / "sounds"

    def test_they_are_listed(self, gated):
        made, folder = gated
        names = {one.name for one in make_plan(made).reads if one.role == "evaluation"}
        assert names == {"sounds.jsonl", *(f"{seed}.wav" for seed in range(5))}  # as many as are used
        assert {folder / "0.wav", folder / "4.wav"} < set(paths_of(make_plan(made).reads))

    def test_data_of_the_hub_is_refused_in_the_plan(self, gated, monkeypatch):
        made, _ = gated
        rows = (Record("row", {"audio": "0.wav", "text": "the fox"}) for _ in range(9))
        monkeypatch.setattr("llmopt.calibration.source.hub_records", lambda spec: rows)
        hub = with_fields(made.evaluation[0], data="hf:org/name", task="transcribe")
        with pytest.raises(UsageError, match="cannot be read"):
            make_plan(with_fields(made, evaluation=(hub,)))

    def test_figures_of_the_same_sounds_are_kept(self, gated, tmp_path, monkeypatch):
        made, folder = gated
        asked, ask = [], gating.ask
        monkeypatch.setattr(gating, "ask", lambda *given: asked.append(1) or ask(*given))

        def gates(name):
            cache = CacheSettings(tmp_path / "cache")
            run_plan(make_plan(made), tmp_path / name, force=False, reporter=Silent(), cache=cache)
            return read_run(tmp_path / name).gates

        assert gates("a") == gates("b")
        assert len(asked) == 1
        say(folder / "0.wav", 7)
        gates("c")
        assert len(asked) == 2
        say(folder / "5.wav", 7)  # is not used
        gates("d")
        assert len(asked) == 2

    def test_another_sound_makes_an_artifact_outdated(self, gated, tmp_path):
        made, folder = gated
        build(made, tmp_path / "out")
        known = {"llmopt": own_version(), **versions()}
        assert why_outdated(make_plan(made), tmp_path / "out", known) is None
        say(folder / "0.wav", 7)
        assert why_outdated(make_plan(made), tmp_path / "out", known) == f"{folder / '0.wav'} was changed"

    def test_a_sound_that_changes_meanwhile_ends_the_run(self, gated, tmp_path, monkeypatch):
        made, folder = gated
        ask = gating.ask
        monkeypatch.setattr(gating, "ask", lambda *given: say(folder / "1.wav", 9) and ask(*given))
        with pytest.raises(LlmoptError, match=r"1.wav` was changed while it was read") as refused:
            build(made, tmp_path / "out")
        assert refused.value.exit_code == 1
        assert not (tmp_path / "out").exists()


class TestInfer:
    """`llmopt infer` of sounds."""

    def infer(self, artifact, data, output, *, reporter=None, force=False, **options):
        options = {"max_new_tokens": 8, **options}
        made = InferOptions(**{"threads": 1, **options})
        reporter = reporter or Silent()
        report = infer(str(artifact), data=str(data), output=output, options=made, force=force, reporter=reporter)
        return report, [json.loads(line) for line in output.read_text().splitlines()]

    def test_sounds_side_by_side_are_written_in_their_order(self, whisper, tmp_path):
        _, artifact, data = whisper
        one, rows = self.infer(artifact, data, tmp_path / "a.jsonl")
        two, others = self.infer(artifact, data, tmp_path / "b.jsonl", threads=2)
        assert [report["parallel_batches"] for report in (one, two)] == [1, 2]
        assert others == rows

    def test_every_runtime_writes_what_the_evaluation_writes(self, whisper, tmp_path):
        source, artifact, data = whisper
        report, rows = self.infer(artifact, data, tmp_path / "a.jsonl", max_new_tokens=12)
        other, own = self.infer(source, data, tmp_path / "b.jsonl", max_new_tokens=12)
        _, evaluated = run(artifact, data, tmp_path / "c.jsonl")
        assert rows == own == [{"index": row["index"], "text": row["generated"]} for row in evaluated]
        assert (report["sounds"], report["resumed_sounds"], report["tokens"]) == (6, 0, other["tokens"])
        assert report["sound_seconds"] == pytest.approx(6 * 0.4)
        assert report["runtime"].startswith("onnxruntime")
        assert other["runtime"].startswith("transformers")

    def test_openvino_writes_the_same(self, whisper, tmp_path):
        pytest.importorskip("openvino")
        source, artifact, data = whisper
        build(recipe(source, export=("openvino", {})), tmp_path / "out")
        _, rows = self.infer(tmp_path / "out", data, tmp_path / "a.jsonl")
        assert rows == self.infer(artifact, data, tmp_path / "b.jsonl")[1]

    def test_a_text_is_as_long_as_the_model_has_room_for(self, whisper, tmp_path):
        _, artifact, data = whisper
        _, rows = self.infer(artifact, data, tmp_path / "a.jsonl", max_new_tokens=None)
        _, short = self.infer(artifact, data, tmp_path / "b.jsonl", max_new_tokens=1)
        assert all(len(one["text"]) < len(row["text"]) for one, row in zip(short, rows, strict=True))

    @pytest.fixture
    def killed(self, whisper, tmp_path, monkeypatch):
        """Return an artifact and sounds of which an earlier run has finished four, in windows of two."""
        _, artifact, data = whisper
        shutil.copytree(data.parent, tmp_path / "sounds", ignore=shutil.ignore_patterns("model", "out"))
        data = tmp_path / "sounds" / data.name
        monkeypatch.setattr(SoundInference, "window", 2)
        write = Scribe.write

        def interrupted(self, session, path, most):
            if path.name == "5.wav":
                raise KeyboardInterrupt
            return write(self, session, path, most)

        with monkeypatch.context() as patch:
            patch.setattr(Scribe, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                self.infer(artifact, data, tmp_path / "out.jsonl")
        assert not (tmp_path / "out.jsonl").exists()
        return artifact, data

    def test_a_killed_run_goes_on_where_it_was(self, killed, tmp_path):
        _, expected = self.infer(*killed, tmp_path / "whole.jsonl")
        report, rows = self.infer(*killed, tmp_path / "out.jsonl")
        assert (report["sounds"], report["resumed_sounds"]) == (6, 4)
        assert report["sound_seconds"] == pytest.approx(6 * 0.4)
        assert rows == expected

    def test_another_sound_begins_anew(self, killed, tmp_path):
        say(killed[1].parent / "0.wav", 7)
        report, rows = self.infer(*killed, tmp_path / "out.jsonl")
        assert report["resumed_sounds"] == 0
        assert rows == self.infer(*killed, tmp_path / "whole.jsonl")[1]

    @pytest.mark.parametrize(
        ("name", "content", "options", "says"),
        [
            ("a.txt", "the fox", {}, "is a text, no list of sounds"),
            ("a.wav", "RIFF", {}, "is a sound, no list of sounds"),
            ("a.jsonl", '{"text": "the fox"}', {}, "which column of `{}` holds the audio"),
            ("a.jsonl", '{"audio": 5}', {}, "is no path"),
            ("a.jsonl", '{"audio": "no.wav"}', {}, "`no.wav` is no sound"),
            ("a.jsonl", '{"audio": "a.jsonl"}', {}, "`a.jsonl` is no sound"),
            ("a.jsonl", '{"clip": "0.wav"}', {"column": "sound"}, "no column `sound`"),
            ("a.jsonl", '{"audio": "0.wav"}', {"pair_column": "audio"}, "one sound at a time"),
            ("a.jsonl", '{"audio": "0.wav"}', {"max_length": 5}, "one sound at a time"),
            ("a.jsonl", '{"audio": "0.wav"}', {"batching": BatchingParams()}, "one sound at a time"),
        ],
    )
    def test_what_names_no_sounds_is_refused(self, whisper, tmp_path, name, content, options, says):
        (tmp_path / name).write_text(content + "\n")
        with pytest.raises(LlmoptError) as refused:
            self.infer(whisper[1], tmp_path / name, tmp_path / "out.jsonl", **options)
        assert says.format(tmp_path / name) in refused.value.what
        assert "--column audio=" not in (refused.value.hint or "")
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_a_data_set_of_the_hub_names_no_files(self, whisper, tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            self.infer(whisper[1], "hf:org/name", tmp_path / "out.jsonl")

    def test_a_sound_is_not_written_over(self, whisper):
        _, artifact, data = whisper
        with pytest.raises(UsageError, match="is the input"):
            self.infer(artifact, data, data.parent / "0.wav", force=True)

    def test_a_list_of_sounds_is_nothing_for_a_model_of_texts(self, family, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"audio": "0.wav"}\n')
        with pytest.raises(UsageError, match="names sounds, and the model reads texts"):
            self.infer(family("llama"), tmp_path / "a.jsonl", tmp_path / "out.jsonl")
