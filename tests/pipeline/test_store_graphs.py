"""Graphs in the store: gone on from wherever they were kept, to the same bytes; kept where that is cheap."""

import json
import shutil

import pytest
from helpers import recipe
from llmopt.core.manifest import RUN
from llmopt.core.recipe import Step
from llmopt.passes.fuse import Fuse
from llmopt.pipeline.cache import graphs, keys
from llmopt.pipeline.cache.sealed import read_sealed
from llmopt.pipeline.cache.store import INDEX, CacheSettings, Index
from llmopt.pipeline.output import file_records
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan
from msgspec.structs import replace as with_fields
from test_store_runs import Told

pytestmark = pytest.mark.slow

CAPPED = {"max_drop": 0.5}
STATIC = ("quantize-static", CAPPED)
ENCODER = (("fold", {}), ("remove-padding", {}), ("fuse", {}), STATIC)
GRAPHS = {
    "encoder": ("bert", ENCODER, "onnx"),
    "decoder": ("llama", (("fuse", {}), ("cast-fp16", CAPPED), ("quantize-weights", CAPPED)), "onnx"),
    "codes": ("llama", (("gptq", {"group_size": 32}), ("simplify", {}), ("fuse", {})), "onnx"),
    "codes first": ("llama", (("rtn", {"group_size": 32, "ignore": ["*.mlp.*"]}), ("quantize-dynamic", {})), "onnx"),
    "opset": ("bert", (("convert-opset", {"opset": 17}), ("fix-shapes", {"batch": 1, "sequence": 16})), "onnx"),
    "encoder-decoder": ("t5", (("fold", {}), ("fuse", {})), "onnx"),
    "openvino": ("bert", (("remove-padding", {}), STATIC), "openvino"),
}


@pytest.fixture
def keep_all(monkeypatch):
    """Keep every graph, however long writing it takes."""
    monkeypatch.setattr(graphs, "SHARE", float("inf"))


@pytest.fixture
def run(cache, tmp_path):
    """Return a function that runs a recipe, and gives the hashes of its files, the export's step, and the notes."""
    count = iter(range(100))

    def build(made, *, store=True):
        output, told = tmp_path / f"out-{next(count)}", Told()
        settings = CacheSettings(cache) if store else None
        run_plan(make_plan(made), output, force=False, reporter=told, cache=settings)
        steps = {step["name"]: step for step in json.loads((output / RUN).read_text())["steps"]}
        files = {name: one.sha256 for name, one in file_records(output).items() if name != RUN}
        return files, next(step for name, step in steps.items() if name.startswith("export ")), told.taken()

    return build


def kept(cache):
    """Return the folders of the graphs that are kept, by how many passes are done."""
    found = {}
    for folder in (cache / "entries").iterdir():
        title = read_sealed(folder / INDEX, Index).title
        if " graph" in title:
            found[title.count(" + ")] = folder
    return found


def edited(made, **params):
    """Return a recipe with other parameters of its last pass."""
    return with_fields(made, passes=(*made.passes[:-1], Step(made.passes[-1].name, params)))


@pytest.mark.parametrize("name", GRAPHS)
def test_from_wherever_a_run_goes_on_the_bytes_are_the_same(name, run, cache, family, text, keep_all, monkeypatch):
    model, passes, export = GRAPHS[name]
    if export == "openvino":
        pytest.importorskip("openvino")
    made = recipe(family(model), *passes, export=(export, {}), data=text)
    whole = run(made, store=False)[0]
    first, step, _ = run(made)
    assert first == whole
    assert not step["cached"]
    monkeypatch.setattr(graphs, "SHARE", 0.0)
    folders = kept(cache)
    for done in sorted(folders, reverse=True):
        got, step, taken = run(made)
        assert got == whole, f"gone on after {done} passes"
        assert taken[-1].count(" + ") == done
        assert step["cached"] is (done == max(folders))
        assert step["seconds_saved"] > 0
        shutil.rmtree(folders[done])


def test_the_last_of_four_edited_runs_alone(run, family, text, keep_all, monkeypatch):
    made = recipe(family("bert"), *ENCODER, export=("onnx", {}), data=text)
    first = run(made)[0]
    other = edited(made, max_drop=0.5, observer="mse")
    expected = run(other, store=False)[0]
    monkeypatch.setattr(Fuse, "run", None)  # what is not run is not missed
    got, step, taken = run(other)
    assert [note.partition(":")[0] for note in taken] == ["onnx graph + fold + remove-padding + fuse"]
    assert (step["cached"], step["seconds_saved"] > 0) == (False, True)
    assert got == expected != first


def test_what_is_read_as_it_is_saved_leaves_the_graph(run, family, text, keep_all):
    made = recipe(family("bert"), STATIC, export=("onnx", {}), data=text)
    run(made)
    assert run(with_fields(made, exports=(Step("onnx", {"fuse": False}),)))[1]["cached"]
    assert run(with_fields(made, exports=(Step("onnx", {"opset": 19}),)))[2] == []


def test_samples_count_from_the_first_pass_that_sees_them(run, family, text, tmp_path, keep_all, monkeypatch):
    made = recipe(family("bert"), *ENCODER, export=("onnx", {}), data=text)
    run(made)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    again = recipe(family("bert"), *ENCODER, export=("onnx", {}), data=other)
    assert [note.partition(":")[0] for note in run(again)[2]] == ["onnx graph + fold + remove-padding + fuse"]
    monkeypatch.setattr(keys, "graph_versions", lambda: {"onnxruntime": "0"})
    assert run(made)[2] == []


def test_a_graph_from_a_file_is_kept_too(run, family, text, tmp_path, keep_all):
    run(recipe(family("bert"), export=("onnx", {"fuse": False})))
    source = tmp_path / "out-0"
    made = recipe(source, *ENCODER, export=("onnx", {}), data=text)
    whole = run(made, store=False)[0]
    assert run(made)[0] == whole
    got, step, _ = run(made)
    assert step["cached"]
    assert got == whole


@pytest.mark.parametrize("file", ["graph.onnx", "graph.data", INDEX])
def test_a_damaged_graph_is_made_anew(file, run, cache, family, text, keep_all):
    made = recipe(family("bert"), *ENCODER, export=("onnx", {}), data=text)
    whole = run(made)[0]
    path = kept(cache)[len(ENCODER)] / file
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    got, _, taken = run(made)
    assert taken[0].count(" + ") == len(ENCODER) - 1
    assert got == whole
    assert run(made)[1]["cached"]


def test_a_failure_is_not_kept_and_what_came_before_is(run, cache, family, text, keep_all, monkeypatch):
    made = recipe(family("bert"), *ENCODER, export=("onnx", {}), data=text)

    def fails(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Fuse, "run", fails)
        with pytest.raises(MemoryError):
            run(made)
    assert sorted(kept(cache)) == [0, 1, 2]
    assert run(made)[0] == run(made, store=False)[0]


def test_a_graph_is_kept_only_where_writing_it_takes_a_twentieth_of_making_it(run, cache, family, monkeypatch):
    made = recipe(family("bert"), ("fold", {}), export=("onnx", {}))
    monkeypatch.setattr(graphs, "_BYTES_PER_SECOND", 1.0)
    run(made)
    assert list((cache / "entries").iterdir()) == []
    monkeypatch.setattr(graphs, "_BYTES_PER_SECOND", 1e15)
    run(made)
    assert 0 in kept(cache)
