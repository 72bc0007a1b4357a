"""Readers of files that others wrote, each given hostile ones: no crash, no hang, no memory without bound."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hostile import TINY, as_json, damaged, edited, hammer
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore")


def both(document: Any) -> Any:
    """Draw a document that was edited, or damaged as bytes."""
    return edited(document).map(as_json) | damaged(as_json(document))


def test_safetensors_headers(tmp_path: Path):
    from llmopt.models.checkpoint import read_header

    tensors = {
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
        "d": {"dtype": "U8", "shape": [0, 5], "data_offsets": [40, 40]},
    }
    header = {"__metadata__": {"format": "pt"}, **tensors}
    path = tmp_path / "x.safetensors"

    def read(drawn: tuple[bytes, int]) -> None:
        raw, lie = drawn
        path.write_bytes(
            struct.pack("<Q", min(len(raw) + lie, (1 << 64) - 1) if len(raw) + lie >= 0 else 0) + raw + bytes(40)
        )
        for info in read_header(path).values():
            assert 0 <= info.offset <= info.offset + info.nbytes <= path.stat().st_size

    read((as_json(header), 0))
    lies = st.sampled_from([0] * 9 + [1, -1, 40, 41, 1 << 20, 1 << 40, 1 << 63])
    hammer(st.tuples(both(header), lies), read)


def test_index_files(tmp_path: Path):
    from llmopt.models.checkpoint import INDEX, Checkpoint

    shard = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    for name in ("model-1.safetensors", "model-2.safetensors"):
        raw = json.dumps({key + name[6]: entry for key, entry in shard.items()}).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    index = {"metadata": {"total_size": 8}, "weight_map": {"a1": "model-1.safetensors", "a2": "model-2.safetensors"}}

    def read(raw: bytes) -> None:
        (tmp_path / INDEX).write_bytes(raw)
        for info in Checkpoint(tmp_path).tensors.values():
            assert info.shard.resolve().parent == tmp_path.resolve()

    read(as_json(index))
    hammer(both(index), read)


def test_config_files(tmp_path: Path):
    from llmopt.models.checkpoint import Checkpoint
    from llmopt.models.locate import Location, context_length
    from llmopt.models.outline import outline

    shutil.copyfile(TINY / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((TINY / "config.json").read_text())
    config |= {"text_config": {"max_position_embeddings": 64}, "quantization_config": {"quant_method": "gptq"}}
    checkpoint = Checkpoint(tmp_path)

    def read(raw: bytes) -> None:
        (tmp_path / "config.json").write_bytes(raw)
        facts = outline(Location(tmp_path, "x"), checkpoint)
        context_length(facts.config)

    read(as_json(config))
    hammer(both(config), read)


def test_tokenizer_files(tmp_path: Path):
    from llmopt.core.untrusted import read_json
    from llmopt.models.text import check_tokenizer_files
    from llmopt.models.vocabulary import _listed

    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:20])
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    path = tmp_path / "tokenizer.json"

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        check_tokenizer_files(tmp_path)
        _listed(read_json(path))

    read(as_json(tokenizer))
    # What is of another layout is left to the library, which says what is wrong with it.
    hammer(both(tokenizer), read, accepts=(ValueError, LookupError, TypeError, AttributeError, OverflowError))


RECIPE = """\
model: {id: org/name, revision: main}
calibration: {data: wiki.txt, samples: 8, length: 32, packing: true}
passes:
  - smooth: {alpha: 0.5}
  - gptq: &gptq {bits: 4, group_size: 64, overrides: [{pattern: "*.down_proj", bits: 8}]}
  - fold
exports:
  - safetensors
  - onnx: {opset: 20}
seed: 1
"""
BOMBS = [
    "&a ",
    "*a",
    "*gptq",
    "<<: *gptq, ",
    "- " * 40,
    "[" * 60,
    "{a: " * 60,
    "!!int ",
    "!!python/object:x ",
    "1e999",
    "0x" + "f" * 900,
]
BOMBS += [
    "9" * 4400,
    "2001-99-99",
    "59:59:59",
    "? ",
    "|\n",
    "---\n",
    "%TAG ! tag:x,2:\n",
    "\t",
    "\x00",
    ".nan",
    ".inf",
    "~",
    "\u2028",
]


def recipes(number: int) -> bytes:
    """Return a recipe with hostile YAML put into it."""
    dice, text = Random(number), RECIPE
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(text) + 1)
        text = text[:at] + dice.choice(BOMBS) + text[at + dice.randrange(10) :]
    return text.encode("utf-8", "surrogatepass")


def test_recipes(tmp_path: Path):
    from llmopt.pipeline.recipe import load_recipe
    from llmopt.pipeline.steps import exporters_of, passes_of

    path = tmp_path / "recipe.yaml"

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        recipe = load_recipe(path)
        passes_of(recipe)
        exporters_of(recipe)

    read(RECIPE.encode())
    hammer(st.integers(0, 1 << 64).map(recipes) | damaged(RECIPE.encode()), read)


def test_manifests(tmp_path: Path, artifact: Path):
    from llmopt.pipeline.artifact import read_manifest
    from llmopt.pipeline.inspect import inspect

    manifest = json.loads((artifact / "llmopt.json").read_text())
    manifest["passes"][0]["changed"] = manifest["passes"][0]["changed"][:2]

    def read(raw: bytes) -> None:
        (tmp_path / "llmopt.json").write_bytes(raw)
        found = read_manifest(tmp_path)
        assert found is not None
        for record in found.exports:
            for name in record.files:
                assert (tmp_path / record.directory / name).resolve().is_relative_to(tmp_path.resolve())
        inspect(str(tmp_path))

    read(as_json(manifest))
    hammer(both(manifest), read)


def test_kept_answers(tmp_path: Path):
    from llmopt.pipeline.fingerprint import check_fingerprint, read_fingerprint

    logits = {"tokens": [[[1, 2], [0, 3]]], "log_probabilities": [[[-0.1, -2.0], [-0.2, -3.0]]], "scale": 4.0}
    kept = {
        "samples": "random token ids",
        "batches": [
            {"inputs": {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, "outputs": {"logits": logits}},
            {"inputs": {"input_ids": [[3, 4]]}, "outputs": {"hidden": {"places": [0, 5], "values": [0.5, -1.0]}}},
        ],
    }
    path = tmp_path / "llmopt.reference.json"

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        read_fingerprint(path)
        # `verify` turns these into its own message: an answer for an output or a place that there is none of.
        check_fingerprint(path, _Answers(), runtime="test", tolerance={"max_difference": 1.0, "mean_kl": 1.0})

    read(as_json(kept))
    hammer(both(kept), read, accepts=(LookupError, ValueError))


class _Answers:
    """A session that answers zeros of the right shape, whatever it is asked."""

    def outputs(self, inputs: Any) -> Any:
        import numpy as np

        ids = inputs["input_ids"]
        if ids.ndim != 2:
            raise KeyError("input_ids")
        return {"logits": np.zeros((*ids.shape, 8), np.float32), "hidden": np.zeros((*ids.shape, 4), np.float32)}
