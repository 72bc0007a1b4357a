"""ONNX graphs that are damaged, incomplete, too new, not to be run, or not what a recipe needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

FETCH = "fetch or export the graph again"


@pytest.fixture
def graph(shell: Any) -> Path:
    """Return a folder with a graph that reads tokens, its weights in a file of their own."""
    import onnx
    from onnx import numpy_helper

    text = '<ir_version: 10, opset_import: ["" : 20]> g (int64[batch, sequence] input_ids) => (float[A, B, C] y) {\n'
    model = onnx.parser.parse_model(text + "x = Gather (table, input_ids) y = MatMul (x, weight) }")
    generator = np.random.default_rng(0)
    for name, shape in (("table", (64, 32)), ("weight", (32, 32))):
        model.graph.initializer.append(numpy_helper.from_array(generator.random(shape, np.float32), name))
    folder = shell.folder / "graph"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return folder


def recipe(shell: Any, model: str, *passes: Any, export: str = "onnx") -> Path:
    path = shell.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": model, "passes": list(passes) or ["fold"], "exports": [export]}))
    return Path("recipe.yaml")


def change(folder: Path, edit: Any) -> None:
    """Let `edit` alter the graph's message, its weights left where they are."""
    import onnx

    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


def test_it_is_built_when_nothing_is_wrong(shell: Any, graph: Path):
    for model in ("graph", "graph/model.onnx"):
        ended = shell.run("run", recipe(shell, model, "fold", "simplify"), "-o", "out", "--force")
        assert ended.code == 0, ended.err


@pytest.mark.parametrize("size", [0, 40, 150])
def test_a_truncated_file(shell: Any, graph: Path, size: int):
    path = graph / "model.onnx"
    path.write_bytes(path.read_bytes()[:size])
    shell.builds_nothing("run", recipe(shell, "graph"), code=1, what="`model.onnx` is damaged", hint=FETCH)


def test_a_file_of_something_else(shell: Any, graph: Path):
    (graph / "model.onnx").write_bytes(b"no graph at all" * 50)
    shell.builds_nothing("run", recipe(shell, "graph"), code=1, what="`model.onnx` is damaged", hint=FETCH)


def test_a_node_that_reads_what_nothing_makes(shell: Any, graph: Path):
    change(graph, lambda proto: proto.graph.node.pop(0))
    expected = {"what": "`model.onnx` is damaged", "where": "nothing makes `x`, which `MatMul` reads", "hint": FETCH}
    shell.builds_nothing("run", recipe(shell, "graph"), code=1, **expected)


def test_weights_that_are_missing(shell: Any, graph: Path):
    (graph / "weights.bin").unlink()
    expected = {"what": "the weights of `model.onnx` are missing", "where": "weights.bin", "hint": "fetch that file"}
    shell.builds_nothing("run", recipe(shell, "graph"), code=1, **expected)


def test_weights_that_are_cut_short(shell: Any, graph: Path):
    path = graph / "weights.bin"
    path.write_bytes(path.read_bytes()[:5000])
    shell.builds_nothing("run", recipe(shell, "graph"), code=1, what="`weights.bin` is damaged", where="`", hint=FETCH)


@pytest.mark.parametrize("how", ["above", "absolute", "link"])
def test_weights_outside_of_the_folder(shell: Any, graph: Path, how: str):
    outside = shell.folder / "secret.bin"
    (graph / "weights.bin").rename(outside)
    location = {"above": "../secret.bin", "absolute": str(outside), "link": "weights.bin"}[how]
    if how == "link":
        (graph / "weights.bin").symlink_to(outside)

    def edit(proto: Any) -> None:
        for tensor in proto.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = location

    change(graph, edit)
    expected = {"what": "the weights of `model.onnx` lie outside its folder", "where": "secret.bin", "hint": "no links"}
    shell.builds_nothing("run", recipe(shell, "graph"), code=1, **expected)


def test_an_opset_of_the_future(shell: Any, graph: Path):
    change(graph, lambda proto: setattr(proto.opset_import[0], "version", 999))
    expected = {"what": "newer version of ONNX", "where": "opset 999", "hint": "update onnx"}
    shell.builds_nothing("run", recipe(shell, "graph"), code=1, **expected)


def test_an_operator_that_no_kernel_serves(shell: Any, graph: Path):
    def edit(proto: Any) -> None:
        proto.graph.node[1].op_type = "Secret"
        proto.graph.node[1].domain = "com.example"
        proto.opset_import.add(domain="com.example", version=1)

    change(graph, edit)
    expected = {"what": "`model.onnx` does not load", "where": "Secret", "hint": "so it must run there"}
    shell.builds_nothing("run", recipe(shell, "graph"), code=1, **expected)


def test_several_graphs_of_which_none_is_named(shell: Any, graph: Path):
    (graph / "model.onnx").rename(graph / "decoder.onnx")
    (graph / "encoder.onnx").write_bytes(b"")
    expected = {"what": "`graph` holds no model.onnx", "where": "decoder.onnx, encoder.onnx", "hint": "decoder.onnx"}
    shell.builds_nothing("run", recipe(shell, "graph"), code=2, **expected)


def test_config_json_that_is_none(shell: Any, graph: Path):
    (graph / "config.json").write_text("{nope")
    shell.builds_nothing(
        "run", recipe(shell, "graph"), code=1, what="config.json is not valid JSON", hint="config.json"
    )


@pytest.mark.parametrize(
    ("step", "export", "what", "hint"),
    [
        ("rtn", "onnx", "`rtn` does not work on an ONNX graph", "on graphs work"),
        ("fold", "onnx-genai", "`fold` works on a graph", "add `onnx`"),
        ({"fix-shapes": {}}, "onnx", "`fix-shapes` has no size to fix", "batch: 1"),
        ({"fix-shapes": {"axes": {"depth": 3}}}, "onnx", "no input has a varying axis `depth`", "name one of these"),
        ({"convert-opset": {"opset": 999}}, "onnx", "there is no opset 999", "or less"),
        ("remove-padding", "onnx", "`remove-padding` needs a mask of tokens", "leave the pass out"),
    ],
)
def test_passes_that_do_not_fit(shell: Any, graph: Path, step: Any, export: str, what: str, hint: str):
    shell.builds_nothing("run", recipe(shell, "graph", step, export=export), code=2, what=what, hint=hint)


def test_an_export_that_needs_the_model(shell: Any, graph: Path):
    path = recipe(shell, "graph", export="safetensors")
    path.write_text(path.read_text().replace("- fold\n", "").replace("passes:\n", "passes: []\n"))
    expected = {"what": "an ONNX graph cannot be exported as `safetensors`", "hint": "exported as onnx"}
    shell.builds_nothing("run", path, code=2, **expected)
