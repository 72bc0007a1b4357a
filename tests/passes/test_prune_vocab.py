"""Fewer tokens: the same pieces for the text that was seen, the same answers for the tokens that are left."""

import json
import shutil

import pytest
import torch
from families import FAMILIES, LINES, make_tokenizer
from helpers import assert_near, build, open_model, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.passes import PassContext
from llmopt.passes import prune_vocab
from llmopt.passes.prune_vocab import PruneVocab, PruneVocabParams
from llmopt.passes.tokenizer_json import Vocabulary, closed, renumbered, special_ids
from llmopt.pipeline.plan import make_plan
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [name for name, one in FAMILIES.items() if one.text]
OTHER = [
    "Vacant zebras expect jovial quizzing by the wharf at midnight.",
    "Seen nowhere: xylophones, kilowatts, ümlaut.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def byte_level():
    """Return a BPE over bytes, as GPT-2 and Llama 3 have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((LINES + OTHER) * 3, trainer)
    return backend


def byte_fallback():
    """Return a BPE as Llama 2 has it: spaces are letters, unknown characters are bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator((LINES + OTHER) * 3, trainer)
    content = json.loads(backend.to_str())
    for token in fallback:
        content["model"]["vocab"][token] = len(content["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(content))


def suffixed():
    """Return a BPE whose words end in a mark, as CLIP's and GPT-1's do."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator((LINES + OTHER) * 3, trainer)
    return backend


def wordpiece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator((LINES + OTHER) * 3, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator((LINES + OTHER) * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return backend


KINDS = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "suffixed": suffixed,
    "wordpiece": wordpiece,
    "unigram": unigram,
}


def model_of(backend, folder, family, **changes):
    """Write a model with a tokenizer of its own."""
    size = backend.get_vocab_size()
    shutil.copytree(family("llama", vocab_size=size, **changes), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=backend.id_to_token(2)).save_pretrained(folder)
    return folder


def run(folder, work, rows, **params):
    return PruneVocab(PruneVocabParams(**params)).run(open_model(folder, work), PassContext(rows=rows))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_seen_is_cut_into_the_same_pieces(kind, family, tmp_path):
    backend = KINDS[kind]()
    folder = model_of(backend, tmp_path / "model", family)
    seen = [LINES[1], LINES[0]]
    rows = [backend.encode(line).ids for line in seen]
    smaller, result = run(folder, tmp_path / "work", rows, multiple=1)
    after = Tokenizer.from_file(str(smaller.folder / "tokenizer.json"))
    assert result.metrics["tokens_after_count"] == after.get_vocab_size() == len(result.vocabulary)
    assert after.get_vocab_size() < backend.get_vocab_size()
    for line in [*seen, "a man is a fox"] if kind == "byte-level" else seen:
        before = backend.encode(line)
        assert after.encode(line).tokens == before.tokens
        assert [result.vocabulary[number] for number in after.encode(line).ids] == before.ids
    for line in OTHER:
        cut = after.encode(line)
        assert len(cut.tokens) >= len(backend.encode(line).tokens)
        if kind != "byte-fallback":
            assert after.decode(cut.ids) == backend.decode(backend.encode(line).ids)
    through = AutoTokenizer.from_pretrained(smaller.folder)
    assert through(seen[0])["input_ids"] == after.encode(seen[0]).ids


@pytest.mark.parametrize("name", TEXTS)
def test_every_family_answers_as_before_for_the_tokens_that_are_left(name, family, tmp_path):
    folder = family(name)
    tokens = make_tokenizer()(LINES[0])["input_ids"]
    model = open_model(folder, tmp_path / "work")
    smaller, result = PruneVocab(PruneVocabParams(multiple=1)).run(model, PassContext(rows=[tokens]))
    old, new = model.materialize(), smaller.materialize()
    places = {before: after for after, before in enumerate(result.vocabulary)}
    text = "decoder_input_ids" if FAMILIES[name].architecture.endswith("ConditionalGeneration") else None
    ids = torch.tensor([tokens])
    mapped = torch.tensor([[places[one] for one in tokens]])
    with torch.no_grad():
        expected = old(input_ids=ids, **({text: ids} if text else {}))
        got = new(input_ids=mapped, **({text: mapped} if text else {}))
    for key in ("logits", "last_hidden_state"):
        if key in expected:
            value = expected[key]
            value = value[..., result.vocabulary] if value.shape != got[key].shape else value
            assert_near(got[key], value)
    assert new.config.get_text_config().vocab_size == len(result.vocabulary) < 272


def test_a_tokenizer_of_another_model_is_refused(family, tmp_path):
    backend = byte_level()
    folder = model_of(backend, tmp_path / "model", family)
    backend.add_special_tokens(["<end>"])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(UsageError, match="the tokenizer has tokens that the model has not: 350 of 350"):
        run(folder, tmp_path / "work", [[1, 5]])


def test_ids_in_config_files_are_renumbered():
    kept = {0: 0, 5: 1, 9: 2}
    config = {
        "eos_token_id": [5, 9],
        "pad_token_id": 0,
        "bos_token_id": None,
        "image_token_id": 400,
        "vocab_size": 10,
        "suppress_tokens": [3, 9],
        "bad_words_ids": [[5, 9], [3]],
        "forced_decoder_ids": [[1, 5], [2, None]],
        "text_config": {"decoder_start_token_id": 9, "hidden_size": 5},
    }
    assert renumbered(config, kept) == {
        "eos_token_id": [1, 2],
        "suppress_tokens": [2],
        "bad_words_ids": [[1, 2]],
        "forced_decoder_ids": [[1, 1], [2, None]],
        "text_config": {"decoder_start_token_id": 2, "hidden_size": 5},
    }
    assert special_ids(config) == {0, 5, 9, 400}


def test_ids_of_special_tokens_at_the_end(family, tmp_path):
    backend = byte_level()
    backend.add_special_tokens(["<end>"])
    backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 350)])
    folder = model_of(backend, tmp_path / "model", family, eos_token_id=350)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 350], "do_sample": True}))
    smaller, result = run(folder, tmp_path / "work", [backend.encode("a man").ids], multiple=1)
    new = result.vocabulary.index(350)
    assert new < 350
    assert json.loads((smaller.folder / "config.json").read_text())["eos_token_id"] == new
    generation = json.loads((smaller.folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, new], "do_sample": True}
    tokenizer = AutoTokenizer.from_pretrained(smaller.folder)
    assert tokenizer("a man")["input_ids"][-1] == new == tokenizer.convert_tokens_to_ids("<end>")


def test_rows_are_renumbered_for_what_follows(family, text, tmp_path):
    steps = [("prune-vocab", {}), ("gptq", {"group_size": 32})]
    folder = model_of(byte_fallback(), tmp_path / "model", family)
    manifest = build(recipe(folder, *steps, data=text), tmp_path / "out")
    assert manifest.exports[0].verification.passed
    record = manifest.passes[0]
    assert record.metrics["tokens_after_count"] % 8 == 0
    assert record.metrics["tokens_after_count"] < record.metrics["tokens_before_count"]
    assert record.metrics["parameters_after_count"] < record.metrics["parameters_before_count"]


def test_the_number_is_rounded_up_with_tokens_that_can_be_made(family, tmp_path):
    backend = byte_fallback()
    folder = model_of(backend, tmp_path / "model", family)
    _, one = run(folder, tmp_path / "one", [backend.encode(LINES[0]).ids], multiple=1)
    smaller, many = run(folder, tmp_path / "many", [backend.encode(LINES[0]).ids], multiple=64)
    assert len(many.vocabulary) == -(-len(one.vocabulary) // 64) * 64
    assert set(one.vocabulary) < set(many.vocabulary)
    content = json.loads((smaller.folder / "tokenizer.json").read_text())
    steps = Vocabulary.read(content, where="").steps()
    assert closed(range(len(many.vocabulary)), steps) == set(range(len(many.vocabulary)))


def test_slow_files_go(family, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(family("llama"), folder)
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        (folder / name).write_text("old")
    smaller, _ = run(folder, tmp_path / "work", [[1, 5, 6]])
    assert not any((smaller.folder / name).exists() for name in ("vocab.json", "merges.txt", "tokenizer.model"))
    assert (folder / "vocab.json").is_file()


def test_a_slow_tokenizer_alone_is_refused(family, text, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(family("llama"), folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("a")
    with pytest.raises(UsageError, match="has a slow tokenizer only"):
        make_plan(recipe(folder, ("prune-vocab", {}), data=text))


def test_a_kind_that_is_not_known_is_refused():
    with pytest.raises(UsageError, match="a tokenizer of the kind `Other` cannot be made smaller"):
        Vocabulary.read({"model": {"type": "Other", "vocab": {}}}, where="here")


def test_a_tokenizer_that_cuts_otherwise_is_an_error(family, tmp_path, monkeypatch):
    """Without the steps in between a token cannot be made any more."""
    folder = model_of(byte_level(), tmp_path / "model", family)
    monkeypatch.setattr(prune_vocab, "closed", lambda wanted, _: set(wanted))
    tokenizer = byte_level()
    rows = [tokenizer.encode(LINES[1]).ids]
    longest = max(tokenizer.get_vocab(), key=len)
    if len(longest) > 2:
        rows.append(tokenizer.encode(longest.replace("Ġ", " ")).ids)
    with pytest.raises(LlmoptError, match="cuts the calibration data otherwise"):
        run(folder, tmp_path / "work", rows, multiple=1)
