"""Single files that are absurd in one way: each is refused by the command line, in bounded time and memory."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hostile import TINY, memory_limit, nested, time_limit
from llmopt.core.errors import LlmoptError
from llmopt.core.untrusted import UnreadableError, is_inner_path, is_plain_name, lies_in, read_json

GIB, MIB = 1 << 30, 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a copy of the bundled model, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.txt")))


def write(path: Path, piece: bytes, size: int) -> Path:
    """Write a file of so many bytes, a piece over and over."""
    with path.open("wb") as stream:
        for _ in range(size // (len(piece) * 1024)):
            stream.write(piece * 1024)
    return path


@pytest.mark.parametrize("piece", [b"[", b'{"":', b"[],", b"{},", b'"a",', b"1,"], ids=repr)
@pytest.mark.parametrize("size", [200 * MIB, 90 * MIB], ids=["200MB", "90MB"])
def test_a_tokenizer_of_200_mb(tmp_path: Path, piece: bytes, size: int):
    from llmopt.models.text import load_tokenizer
    from llmopt.models.vocabulary import vocabulary

    path = write(tmp_path / "tokenizer.json", piece, size)
    for read in (load_tokenizer, vocabulary):
        with memory_limit(GIB), time_limit(20), pytest.raises(LlmoptError, match="no tokenizer can be loaded"):
            read(tmp_path)
    path.unlink()


@pytest.mark.parametrize("text", [b"[" * 3000, b'{"a":' * 900 + b"1" + b"}" * 900, b"[" * 65 + b"]" * 65])
def test_json_that_is_nested_too_deeply(tmp_path: Path, text: bytes):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UnreadableError, match="nested"):
        read_json(tmp_path / "x.json")


def test_json_as_deep_as_ours_is_read(tmp_path: Path):
    (tmp_path / "x.json").write_text(json.dumps(nested(60)))
    assert read_json(tmp_path / "x.json") == nested(60)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"shape": [10**9] * 100_000, "data_offsets": [0, 4]}, "at most 64 dimensions"),
        ({"shape": [10**4000, 10**4000], "data_offsets": [0, 4]}, "no sizes"),
        ({"shape": [1], "data_offsets": [1 << 70, (1 << 70) + 4]}, "no sizes"),
        ({"shape": [1], "data_offsets": [2, 6]}, "begins at byte 2"),
        ({"shape": [2], "data_offsets": [0, 8]}, "the file holds 4"),
        ({"shape": nested(500), "data_offsets": [0, 4]}, "nested"),
    ],
    ids=["dimensions", "digits", "far", "gap", "long", "deep"],
)
def test_a_header_of_absurd_sizes(tmp_path: Path, entry: Any, why: str):
    from llmopt.models.checkpoint import read_header

    raw = json.dumps({"a": {"dtype": "F32", **entry}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    with memory_limit(GIB), time_limit(10), pytest.raises(LlmoptError, match="is damaged") as caught:
        read_header(path)
    assert why in str(caught.value.where)


def test_tensors_that_overlap_or_stand_twice(tmp_path: Path):
    from llmopt.models.checkpoint import read_header

    one = '"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}'
    other = one.replace('"a"', '"b"')
    path = tmp_path / "a.safetensors"
    for entries, why in (((one, other), "`b` begins at byte 0"), ((one, one), "'a' stands in it twice")):
        raw = ("{" + ", ".join(entries) + "}").encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
        with pytest.raises(LlmoptError, match="is damaged") as caught:
            read_header(path)
        assert why in str(caught.value.where)


def test_a_header_of_millions_of_tensors(tmp_path: Path):
    from llmopt.models.checkpoint import read_header

    entries = ",".join(f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(700_000))
    raw = f"{{{entries}}}".encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    del entries, raw
    with memory_limit(GIB), time_limit(20), pytest.raises(LlmoptError) as caught:
        read_header(path)
    assert "more than the 4000000 values" in str(caught.value.where)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_labels", 10**12),
        ("max_position_embeddings", 1 << 40),
        ("head_dim", 1 << 40),
        ("num_experts", -(10**6)),
        ("depths", [2, 10**7]),
        ("vocab_size", 1e300),
        ("text_config", {"n_ctx": 1 << 33}),
    ],
)
def test_a_config_of_a_billion_layers(model: Path, field: str, value: Any):
    from llmopt.pipeline.inspect import inspect

    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with memory_limit(GIB), time_limit(10), pytest.raises(LlmoptError, match="makes no model"):
        inspect(str(model))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_that_lead_out_of_the_folder(model: Path, tmp_path: Path, name: str):
    from llmopt.core.recipe import ModelSpec, Recipe, Step
    from llmopt.models.text import load_tokenizer
    from llmopt.pipeline.plan import make_plan

    secret = tmp_path / "secret"
    (model / name).rename(secret)
    (model / name).symlink_to(secret)
    recipe = Recipe(model=ModelSpec(id=str(model)), exports=(Step("safetensors"),))
    with pytest.raises(LlmoptError, match="is a link that leads out of its folder"):
        load_tokenizer(model) if name == "tokenizer.json" else make_plan(recipe)


def test_side_files_are_not_copied_through_a_link(model: Path, tmp_path: Path):
    from llmopt.models.side_files import copy_side_files

    (tmp_path / "secret").write_text("key")
    (model / "vocab.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(LlmoptError, match="is a link that leads out"):
        copy_side_files(model, tmp_path / "out")


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    (snapshot / "onnx").mkdir(parents=True)
    (blobs / "aa").write_text("{}")
    for name in ("config.json", "onnx/model.onnx"):
        (snapshot / name).symlink_to(blobs / "aa")
        assert lies_in(snapshot / name, snapshot)
    (tmp_path / "other").write_text("x")
    (snapshot / "out.json").symlink_to(tmp_path / "other")
    assert not lies_in(snapshot / "out.json", snapshot)
    (snapshot / "ring").symlink_to(snapshot / "ring")
    assert not lies_in(snapshot / "ring" / "x", snapshot) or not (snapshot / "ring").exists()


@pytest.mark.parametrize("name", ["a", "a.b", "model-00001-of-00002.safetensors", "é"])
def test_names_of_files(name: str):
    assert is_plain_name(name)
    assert is_inner_path(f"onnx/{name}")


@pytest.mark.parametrize(
    "name", ["", "..", "/a", "a/../b", "../a", "a\\b", "C:a", "\0", "a\nb", "\x1b[2J", "x" * 300, 3]
)
def test_names_that_lead_elsewhere(name: Any):
    assert not is_plain_name(name)
    assert not is_inner_path(name)


TEN = "[" + ", ".join(["*{0}"] * 10) + "]"
PAIRS = tuple(zip("abcdefghi", "bcdefghij", strict=True))
YAML = {
    "aliases": "a: &a [x, x]\n" + "".join(f"{b}: &{b} {TEN.format(a)}\n" for a, b in PAIRS),
    "merges": "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: {TEN.format(a)}}}\n" for a, b in PAIRS),
    "ring": "model: &a [*a]\n",
    "deep": "model: " + "[" * 5000,
    "deep-blocks": "- " * 50_000,
    "long-name": "model: x\n" + "x" * 100_000 + ": 1",
    "huge": "model: x\n# " + "x" * 300_000,
    "many": "model: [" + "a," * 60_000 + "]",
    "digits": "seed: " + "9" * 5000,
    "digits-of-a-key": "model: x\npasses:\n- rtn: {0x" + "f" * 5000 + ": 1}",
    "date": "model: 2001-99-99",
    "code": "model: !!python/object/apply:os.system [id]",
    "null-byte": 'model: "a\\0b"',
    "surrogate": 'model: "\\ud800"',
}


@pytest.mark.parametrize("name", YAML)
def test_recipes_that_grow(tmp_path: Path, name: str):
    from llmopt.pipeline.recipe import load_recipe
    from llmopt.pipeline.steps import passes_of

    path = tmp_path / "recipe.yaml"
    path.write_text(YAML[name])
    with memory_limit(1 << 28), time_limit(20), pytest.raises(LlmoptError) as caught:
        passes_of(load_recipe(path))
    assert len(str(caught.value)) < 5000


def test_brackets_are_not_followed_to_their_end(tmp_path: Path):
    """PyYAML looks at every open bracket for each one that opens: a thousand took it a second."""
    from llmopt.pipeline.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(YAML["deep"])
    with pytest.raises(LlmoptError, match="brackets are nested more than 32 levels deep"):
        load_recipe(path)


def test_aliases_that_stand_for_little_are_read(tmp_path: Path):
    from llmopt.pipeline.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: x\npasses:\n  - rtn: &p {bits: 4}\n  - gptq: {<<: *p, damping: 0.1}\nexports: [safetensors]\n"
    )
    assert [step.params.get("bits") for step in load_recipe(path).passes] == [4, 4]


@pytest.mark.parametrize("file", ["llmopt.json", "llmopt.run.json", "llmopt.reference.json"])
@pytest.mark.parametrize("text", [b"[" * (200 * MIB), b"[]" + b" " * (101 * MIB), b"\xff", b"", b"3", b"{}", b"null"])
def test_records_of_an_artifact(artifact: Path, tmp_path: Path, file: str, text: bytes):
    from llmopt.pipeline.artifact import read_manifest, read_run
    from llmopt.pipeline.fingerprint import read_fingerprint

    (tmp_path / file).write_bytes(text)
    readers: dict[str, Any] = {"llmopt.json": read_manifest, "llmopt.run.json": read_run}
    with memory_limit(GIB), time_limit(10), pytest.raises(LlmoptError, match="is damaged"):
        readers[file](tmp_path) if file in readers else read_fingerprint(tmp_path / file)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "C:\\x"])
def test_a_manifest_that_names_files_elsewhere(artifact: Path, tmp_path: Path, name: str):
    from llmopt.pipeline.artifact import read_manifest

    manifest = json.loads((artifact / "llmopt.json").read_text())
    for change in (
        lambda made: made["files"].update({name: {"bytes": 1, "sha256": "0"}}),
        lambda made: made["exports"][0]["files"].update({name: {"bytes": 1, "sha256": "0"}}),
        lambda made: made["exports"][0].update(directory=name),
    ):
        made = json.loads(json.dumps(manifest))
        change(made)
        (tmp_path / "llmopt.json").write_text(json.dumps(made))
        with pytest.raises(LlmoptError, match="is damaged"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 200 * MIB])
def test_an_adapter_whose_header_is_longer_than_its_file(tmp_path: Path, length: int):
    from llmopt.passes.merge_adapter import read_adapter

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write(tmp_path / "adapter_model.safetensors", b"[", 150 * MIB)
    with (tmp_path / "adapter_model.safetensors").open("r+b") as stream:
        stream.write(struct.pack("<Q", length))
    with memory_limit(GIB), time_limit(20), pytest.raises(LlmoptError, match="is damaged"):
        read_adapter(tmp_path)
