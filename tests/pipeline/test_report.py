"""What a report gathers from artifacts and files of measurements, the model card of a build, and the comparison."""

import json
import math
import shutil

import msgspec
import pytest
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.manifest import MANIFEST, RUN
from llmopt.core.parts import part_of
from llmopt.core.progress import Silent
from llmopt.core.recipe import ModelSpec, Recipe, Step
from llmopt.pipeline.card import CARD, license_of
from llmopt.pipeline.compare import compare_artifacts
from llmopt.pipeline.parts import folder_parts
from llmopt.pipeline.report import make_report, write_report
from llmopt.pipeline.verify import verify

WEIGHTS = (".safetensors", ".onnx", ".data", ".bin", ".xml")


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    """Two artifacts of one model: int4 with two exports, int8 with one."""
    root = tmp_path_factory.mktemp("artifacts")
    steps = (Step("rtn", {"bits": 4, "group_size": 32}),)
    exports = (Step("safetensors"), Step("onnx-genai"))
    both = Recipe(model=ModelSpec(id=str(family("llama"))), passes=steps, exports=exports)
    build(both, root / "int4")
    build(recipe(family("llama"), ("rtn", {"bits": 8, "group_size": 32})), root / "int8")
    return root


def report(*paths, **files):
    return make_report([str(path) for path in paths], **files)


def scored(path, perplexity, **others):
    return {"path": str(path), "runtime": "r 1", "data": "d", "perplexity": perplexity, **others}


def write(place, document):
    place.write_text(json.dumps(document))
    return place


class TestDocument:
    def test_sizes_by_part_add_up_to_the_files(self, made):
        (entry,) = report(made / "int4").artifacts
        assert [export.name for export in entry.exports] == ["safetensors", "onnx-genai"]
        for export in entry.exports:
            folder = made / "int4" / export.directory
            assert sum(export.parts.values()) == export.size_bytes
            assert export.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
            assert set(export.parts) >= {"attention", "mlp", "norms", "files"}
        assert sum(entry.source["parts"].values()) == entry.source["bytes"]

    def test_layers_and_maps(self, made):
        (entry,) = report(made / "int4").artifacts
        manifest = json.loads((made / "int4" / MANIFEST).read_text())
        figures = manifest["passes"][0]["layers"]
        errors, bits = entry.maps
        assert (errors.figure, bits.figure) == ("relative_error", "bits")
        assert entry.layers["count"] == len(figures) == len(errors.blocks) * len(errors.kinds)
        for block, row in zip(errors.blocks, errors.cells, strict=True):
            for kind, value in zip(errors.kinds, row, strict=True):
                assert value == figures[f"{errors.stack}.{block}.{kind}"]["relative_error"]
        assert errors.high == max(one["relative_error"] for one in figures.values())
        assert figures[errors.highest]["relative_error"] == errors.high
        assert {value for row in bits.cells for value in row} == {4}

    def test_the_size_after_each_step(self, made):
        (entry,) = report(made / "int8").artifacts
        source, rounded, exported = entry.size_path
        assert [source.name, rounded.name, exported.name] == ["source", "rtn", "export safetensors"]
        files = [file for file in (made / "int8").iterdir() if file.suffix == ".safetensors"]
        assert rounded.size_bytes == pytest.approx(sum(file.stat().st_size for file in files), rel=0.05)
        assert source.size_bytes > exported.size_bytes > rounded.size_bytes

    def test_what_gates_measured_is_written_as_gates_write_it(self, made, tmp_path):
        shutil.copytree(made / "int8", tmp_path / "out")
        run = json.loads((tmp_path / "out" / RUN).read_text())
        gate = {"text": "accuracy_drop<=20%", "metric": "accuracy_drop", "value": 0.1333, "low": 0.1, "high": 0.2}
        gate |= {"limit": 0.2, "comparison": "<=", "unit": "points", "verdict": "passed", "samples": 30}
        write(tmp_path / "out" / RUN, run | {"gates": [gate | {"export": "safetensors"}]})
        made = report(tmp_path / "out")
        assert made.artifacts[0].size_path[-1].quality == {"accuracy_drop_points": 0.1333}
        write_report(made, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert ">accuracy drop 13.33 points</td>" in page
        assert "0.1333" not in page

    def test_names_tell_artifacts_apart(self, made, tmp_path):
        shutil.copytree(made / "int8", tmp_path / "a" / "out")
        shutil.copytree(made / "int8", tmp_path / "b" / "out")
        assert [one.name for one in report(tmp_path / "a" / "out", made / "int8").artifacts] == ["out", "int8"]
        two = report(tmp_path / "a" / "out", tmp_path / "b" / "out")
        assert [one.name for one in two.artifacts] == ["a/out", "b/out"]

    def test_the_record_of_the_run(self, made, tmp_path):
        (entry,) = report(made / "int8").artifacts
        assert [step.name for step in entry.run.steps][:1] == ["rtn"]
        shutil.copytree(made / "int8", tmp_path / "out")
        (tmp_path / "out" / RUN).write_text("{")
        (entry,) = report(tmp_path / "out").artifacts
        assert entry.run is None
        assert any(RUN in line for line in entry.warnings)
        (tmp_path / "out" / RUN).unlink()
        (entry,) = report(tmp_path / "out").artifacts
        assert (entry.run, entry.warnings) == (None, [])
        write_report(report(tmp_path / "out"), tmp_path / "page.html")

    def test_a_damaged_export_still_has_a_report(self, made, tmp_path):
        shutil.copytree(made / "int8", tmp_path / "out")
        (tmp_path / "out" / "model.safetensors").write_bytes(b"\xff" * 64)
        (entry,) = report(tmp_path / "out").artifacts
        assert entry.exports[0].parts == {}
        assert any("sizes by part are left out" in line for line in entry.warnings)

    @pytest.mark.parametrize("where", ["", "int4/safetensors"])
    def test_what_is_no_artifact_is_refused(self, made, tmp_path, where):
        folder = made / where if where else tmp_path
        with pytest.raises(UsageError, match="is no artifact of llmopt") as caught:
            report(folder)
        assert ("did you mean" in caught.value.hint) == bool(where)

    def test_an_artifact_of_an_older_version_has_a_report(self, made, tmp_path):
        shutil.copytree(made / "int8", tmp_path / "out")
        manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
        del manifest["source"]["parts"], manifest["passes"][0]["layers"], manifest["passes"][0]["weight_bytes"]
        write(tmp_path / "out" / MANIFEST, manifest)
        (entry,) = report(tmp_path / "out").artifacts
        assert (entry.layers, entry.maps) == (None, [])
        write_report(report(tmp_path / "out"), tmp_path / "page.html")


class TestMeasured:
    def test_figures_find_their_export_and_their_source(self, made, family, tmp_path):
        source = family("llama")
        evals = [
            write(tmp_path / "a.json", scored(made / "int4" / "onnx-genai", 9.0, loss_stderr_nats=0.01)),
            write(tmp_path / "b.json", scored(source, 8.0)),
            write(tmp_path / "c.json", scored(made / "int8", 8.5, source={"perplexity": 8.0, "mean_kl_nats": 0.1})),
        ]
        bench = {"machine": {"cores": 2}, "threads": 1, "measured": [{"path": str(made / "int8"), "runtime": "r"}]}
        bench["measured"][0]["decode_tokens_per_second"] = 200.0
        found = report(made / "int4", made / "int8", evals=evals, benches=[write(tmp_path / "d.json", bench)])
        four, eight = found.artifacts
        assert [one.export for one in four.evaluations] == ["onnx-genai", None]
        figure = four.evaluations[0].figures["perplexity"]
        assert (figure.low, figure.high) == pytest.approx((9 * math.exp(-0.0196), 9 * math.exp(0.0196)), rel=1e-4)
        assert "loss_stderr_nats" not in four.evaluations[0].figures
        assert eight.evaluations[-1].figures["source_perplexity"].value == 8.0
        assert eight.speeds[0].machine == {"cores": 2, "threads": 1}
        points = {point.name: point for point in found.points}
        assert points["int4 (onnx-genai)"].quality == 9.0
        assert points["int4 (safetensors)"].quality is None
        assert points["int8 (safetensors)"].latency_ms == 5.0
        assert [point.quality for point in found.points if point.is_source] == [8.0]
        write_report(found, tmp_path / "page.html")
        assert "Size and quality" in (tmp_path / "page.html").read_text()

    def test_metrics_with_intervals_of_their_own(self, made, tmp_path):
        rows = [
            {"metric": "perplexity", "value": 9.0, "low": 8.5, "high": 9.5, "unit": "", "source": 8.0},
            {"metric": "accuracy_drop", "value": 0.02, "low": None, "high": None, "unit": "points", "source": None},
            {"metric": "mean_kl", "value": 0.1, "low": 0.05, "high": 0.2, "unit": "nats"},
        ]
        document = scored(made / "int8", 9.0, metrics=rows, confidence=0.9, task="perplexity", windows=40)
        entry = report(made / "int8", evals=[write(tmp_path / "a.json", document)]).artifacts[0]
        (found,) = entry.evaluations
        assert (found.confidence, found.data) == (0.9, "perplexity, d")
        assert found.figures.keys() == {"perplexity", "source_perplexity", "accuracy_drop_points", "mean_kl_nats"}
        assert found.figures["perplexity"].high == 9.5

    @pytest.mark.parametrize(
        ("kind", "text", "what"),
        [
            ("evals", "{", "is not JSON"),
            ("evals", "[]", "is not what `llmopt eval --json` prints"),
            ("evals", '{"measured": []}', "is not what `llmopt eval --json` prints"),
            ("evals", '{"path": "elsewhere"}', "which is not in this report"),
            ("benches", '{"path": "x"}', "is not what `llmopt bench --json` prints"),
            ("benches", '{"measured": [3]}', "is not what `llmopt bench --json` prints"),
            ("evals", "[" * 100_000, "is not JSON"),
            ("evals", None, "cannot read"),
        ],
    )
    def test_other_files_are_refused(self, made, tmp_path, kind, text, what):
        path = tmp_path / "file.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(UsageError, match=what) as caught:
            report(made / "int8", **{kind: [path]})
        assert caught.value.hint


class TestCard:
    def test_a_build_writes_it_and_its_hash(self, made):
        manifest = json.loads((made / "int4" / MANIFEST).read_text())
        assert CARD in manifest["files"]
        assert verify(made / "int4", reporter=Silent())

    def test_a_report_writes_the_same(self, made, tmp_path):
        write_report(report(made / "int4"), tmp_path / "card.md")
        assert (tmp_path / "card.md").read_bytes() == (made / "int4" / CARD).read_bytes()

    def test_it_does_not_depend_on_the_folder(self, family, tmp_path):
        for name in ("one", "two/deeper"):
            build(recipe(family("llama"), ("rtn", {"group_size": 32})), tmp_path / name)
        assert (tmp_path / "one" / CARD).read_bytes() == (tmp_path / "two" / "deeper" / CARD).read_bytes()

    def test_people_may_edit_it(self, made, tmp_path):
        notes = []

        class Heard(Silent):
            def note(self, message):
                notes.append(message)

        shutil.copytree(made / "int8", tmp_path / "out")
        with (tmp_path / "out" / CARD).open("a") as stream:
            stream.write("\nHow we use it.\n")
        assert verify(tmp_path / "out", reporter=Heard())
        assert any(CARD in note for note in notes)

    def test_the_license_of_the_source_is_kept(self, family, tmp_path):
        source = tmp_path / "model"
        shutil.copytree(family("llama"), source)
        (source / CARD).write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n")
        build(recipe(source, ("rtn", {"group_size": 32})), tmp_path / "out")
        assert "\nlicense: apache-2.0\n" in (tmp_path / "out" / CARD).read_text()
        shutil.rmtree(source)
        write_report(report(tmp_path / "out"), tmp_path / "card.md")
        assert (tmp_path / "card.md").read_bytes() == (tmp_path / "out" / CARD).read_bytes()

    @pytest.mark.parametrize(
        "text",
        [
            "no header",
            "---\nlicense: [\n---\n",
            "---\nlicense: {a: b}\n---\n",
            "---\nlicense: '<script>'\n---\n",
            "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: mit\n---\n",
            "---\n- license\n---\n",
        ],
    )
    def test_a_header_that_cannot_be_read_says_nothing(self, tmp_path, text):
        (tmp_path / CARD).write_text(text)
        assert license_of(tmp_path) == {}

    def test_it_is_of_one_artifact(self, made, tmp_path):
        with pytest.raises(UsageError, match="a model card is of one artifact"):
            write_report(report(made / "int4", made / "int8"), tmp_path / "card.md")

    def test_the_ending_tells_what_to_write(self, made, tmp_path):
        with pytest.raises(UsageError, match=r"cannot tell what to write from `report.pdf`"):
            write_report(report(made / "int4"), tmp_path / "report.pdf")


class TestCompare:
    def test_layers_that_differ_are_named(self, made):
        found = compare_artifacts(str(made / "int4"), str(made / "int8"), reporter=Silent())
        (weights,) = found["weights"]
        assert not weights["equal"]
        manifest = json.loads((made / "int4" / MANIFEST).read_text())
        assert weights["different"] == sorted(f"{name}.weight" for name in manifest["passes"][0]["changed"])
        assert found["layers"]["with_other_figures"] == len(weights["different"])
        assert found["passes"][0]["different_parameters"] == ["bits 4 / 8"]
        assert found["sources"]["equal"]
        json.dumps(found)

    def test_the_same_codes_in_other_files(self, made, family, tmp_path):
        """One artifact in one shard, the other in several: every file differs, no weight does."""
        params = {"max_shard_gb": 0.0001}
        other = recipe(family("llama"), ("rtn", {"bits": 8, "group_size": 32}), export=("safetensors", params))
        build(other, tmp_path / "shards")
        found = compare_artifacts(str(made / "int8"), str(tmp_path / "shards"), reporter=Silent())
        (weights,) = found["weights"]
        assert weights["equal"]
        assert weights["compared"] > 20

    def test_equal_files_are_not_read(self, made, tmp_path):
        shutil.copytree(made / "int8", tmp_path / "copy")
        (weights,) = compare_artifacts(str(made / "int8"), str(tmp_path / "copy"), reporter=Silent())["weights"]
        assert (weights["equal"], weights["note"]) == (True, "the files' hashes are equal")

    def test_graphs_are_compared_by_their_constants(self, made, family, tmp_path):
        steps = (Step("rtn", {"bits": 4, "group_size": 32, "ignore": ["*.0.mlp.down_proj"]}),)
        build(
            Recipe(model=ModelSpec(id=str(family("llama"))), passes=steps, exports=(Step("onnx-genai"),)),
            tmp_path / "part",
        )
        found = compare_artifacts(str(made / "int4"), str(tmp_path / "part"), reporter=Silent())
        (weights,) = found["weights"]
        assert weights["export"] == "onnx-genai"
        assert (weights["equal"], weights["different"]) == (False, [])
        assert weights["compared"] > 10
        assert "model.layers.0.mlp.down_proj.codes" in weights["in_first_alone"]
        assert "model.layers.0.mlp.down_proj.MatMul.weight" in weights["in_second_alone"]

    def test_an_artifact_is_not_compared_with_itself(self, made):
        with pytest.raises(UsageError, match="with itself"):
            compare_artifacts(str(made / "int8"), str(made / "int4" / ".." / "int8"), reporter=Silent())


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "mixtral"])
def test_the_names_of_weights_tell_their_part(name, family):
    parts = folder_parts(family(name))
    whole = sum(parts.values())
    assert parts.keys() >= {"embeddings", "attention", "mlp", "norms"}
    assert parts.get("other", 0) + parts.get("unnamed", 0) < 0.05 * whole


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.4.final_norm_layernorm.weight", "norms"),
        ("transformer.h.0.ln_1.bias", "norms"),
        ("lm_head.MatMul.weight", "head"),
        ("model.layers.0.self_attn.q_proj+k_proj+v_proj.codes", "attention"),
        ("model.layers.0.mlp.experts.3.w1.weight", "mlp"),
        ("bert.encoder.layer.0.output.dense.weight", "mlp"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "attention"),
        ("val_11", "unnamed"),
        ("onnx::MatMul_1234", "unnamed"),
        ("cos_cache", "other"),
    ],
)
def test_part_of(name, part):
    assert part_of(name) == part


def test_the_document_is_json(made):
    found = report(made / "int4")
    assert json.loads(msgspec.json.encode(found))["artifacts"][0]["name"] == "int4"


def test_a_full_disk_leaves_no_half_a_page(made, tmp_path):
    (tmp_path / "page.html").write_text("old")
    (tmp_path / ".page.html.partial").mkdir()
    with pytest.raises(LlmoptError, match="cannot write to"):
        write_report(report(made / "int8"), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "old"
