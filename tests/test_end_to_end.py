"""The main job from the command line to a runtime that answers, on the bundled model."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
CALIBRATION = ("--calibration", str(TINY / "calibration.txt"), "--samples", "16", "--length", "64")
GRID = ("--group-size", "64")
EXPORTS = ("--export", "safetensors", "--export", "onnx", "--export", "onnx-genai:activations=float32")
NAMES = ("safetensors", "onnx", "onnx-genai")
HEAVY = ("torch", "transformers", "onnx", "numpy", "rich")


class Ended(NamedTuple):
    stdout: str
    stderr: str


def llmopt(*arguments):
    """Run the command line in this process, without a terminal, and leave the process as it was."""
    from llmopt.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = dict(os.environ)
    try:
        with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
    assert code == 0, err.getvalue()
    return Ended(out.getvalue(), err.getvalue())


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return gptq in all three exports, what was printed, and the recipe that was saved."""
    folder = tmp_path_factory.mktemp("built")
    options = (*GRID, *CALIBRATION, *EXPORTS, "--save-recipe", folder / "recipe.yaml", "--seed", "3", "--json")
    ended = llmopt("quantize", TINY, "-o", folder / "out", *options)
    return folder, ended


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounded") / "out"
    return folder, llmopt("quantize", TINY, "-o", folder, *GRID)


def test_several_exports_lie_side_by_side(built):
    folder, ended = built
    made = json.loads(ended.stdout)
    assert made["directory"] == str(folder / "out")
    assert [record["name"] for record in made["exports"]] == list(NAMES)
    kept = {"README.md", "llmopt.json", "llmopt.reference.json", "llmopt.run.json"}
    assert {path.name for path in (folder / "out").iterdir()} == {*NAMES, *kept}
    assert json.loads((folder / "out" / "llmopt.json").read_text())["exports"] == made["exports"]
    for record in made["exports"]:
        check = record["verification"]
        assert check["passed"]
        assert check["weights_equal"] is True
        assert check["samples"] == "held-out calibration text"
    assert "note: calibration: 16 samples, 1024 tokens from one running text" in ended.stderr


def test_one_export_is_the_folder_itself(rounded):
    folder, ended = rounded
    assert {"config.json", "model.safetensors", "llmopt.json", "tokenizer.json"} <= {
        one.name for one in folder.iterdir()
    }
    assert not list(folder.glob("*.txt"))  # the texts beside the model are not the model's
    assert f'AutoModelForCausalLM.from_pretrained("{folder}")' in ended.stdout


def test_the_saved_recipe_builds_the_same_bytes(built, tmp_path):
    folder, _ = built
    command = [sys.executable, "-m", "llmopt", "run", folder / "recipe.yaml", "-o", tmp_path / "again", "-q"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)  # another process, other hash seeds
    assert (ended.stdout, ended.stderr) == ("", "")
    before, after = files(folder / "out"), files(tmp_path / "again")
    assert before.pop("llmopt.run.json") != after.pop("llmopt.run.json")  # its times
    assert sorted(before) == sorted(after)
    assert [name for name in before if before[name] != after[name]] == []


def test_the_saved_recipe_can_be_planned(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = built
    ended = llmopt("plan", folder / "recipe.yaml")
    for text in ("gptq", "int4", "safetensors", "onnx-genai", "peak memory", "opened again in onnxruntime"):
        assert text in ended.stdout
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(llmopt("plan", folder / "recipe.yaml", "--json").stdout)
    assert plan["recipe"]["seed"] == 3
    assert plan["model"]["blocks"] == 4
    assert [step["kind"] for step in plan["steps"]] == ["sweep", *["export", "verify"] * 3]


def test_the_estimate_of_the_output_is_near(built):
    folder, _ = built
    plan = json.loads(llmopt("plan", folder / "recipe.yaml", "--json").stdout)
    suffixes = (".safetensors", ".data", ".onnx")
    size = sum(len(data) for name, data in files(folder / "out").items() if name.endswith(suffixes))
    assert abs(plan["output_bytes"] - size) < 0.25 * size


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = llmopt("quantize", TINY, "-o", "out", *GRID, *CALIBRATION, *EXPORTS, "--dry-run")
    assert "Estimates" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_it_verifies_again_wherever_it_lies(built, tmp_path):
    folder, _ = built
    moved = tmp_path / "moved"
    moved.symlink_to(folder / "out")
    records = json.loads(llmopt("verify", moved, "--json").stdout)["exports"]
    assert [record["name"] for record in records] == list(NAMES)
    assert all(record["verification"]["passed"] for record in records)
    one = json.loads(llmopt("verify", folder / "out" / "onnx", "--json").stdout)["exports"]
    assert [record["name"] for record in one] == ["onnx"]


def test_what_was_just_verified_verifies_again_with_int8_activations(tmp_path):
    """Rounding to nearest comes near the limit of what int8 activations may change: the same texts must be compared."""
    folder = tmp_path / "out"
    llmopt("quantize", TINY, "-o", folder, *GRID, "--export", "onnx-genai")
    built = json.loads((folder / "llmopt.json").read_text())["exports"][0]["verification"]
    again = json.loads(llmopt("verify", folder, "--json").stdout)["exports"][0]["verification"]
    assert again["positions"] == built["positions"] == 512
    assert again["mean_kl"] <= built["mean_kl"] + 1e-5  # a lower bound of it


def test_inspect(built):
    folder, _ = built
    about = json.loads(llmopt("inspect", folder / "out", "--json").stdout)
    assert about["kind"] == "artifact"
    assert about["architecture"] == "LlamaForCausalLM"
    assert [record["export"] for record in about["exports"]] == list(NAMES)
    model = json.loads(llmopt("inspect", TINY, "--json").stdout)
    assert (model["kind"], model["blocks"], model["linear_layers"]) == ("model", 4, 28)


@pytest.mark.parametrize("name", NAMES)
def test_eval(built, name):
    folder, _ = built
    data = ("--data", TINY / "heldout.txt", "--length", "128", "--limit", "4")
    report = json.loads(llmopt("eval", folder / "out" / name, *data, "--json").stdout)
    assert report["windows"] == 4
    assert report["tokens"] == 4 * 128  # a BOS before each window
    assert 1 < report["perplexity"] < 100
    source = report["source"]
    assert 0 <= source["mean_kl_nats"] < 0.5
    assert 0.5 < source["top1_agreement"] <= 1
    assert report["perplexity"] == pytest.approx(source["perplexity"] * (1 + source["perplexity_increase_share"]))


def test_bench(built):
    folder, _ = built
    options = ("--against", TINY, "--repeats", "2", "--prompt-tokens", "32", "--new-tokens", "8", "--threads", "1")
    report = json.loads(llmopt("bench", folder / "out" / "onnx-genai", *options, "--json").stdout)
    fast, plain = report["measured"]
    for one in (fast, plain):
        for figure in ("load_seconds", "size_bytes", "prefill_tokens_per_second", "decode_tokens_per_second"):
            assert one[figure] > 0
        assert one["peak_memory_bytes"] > 1 << 20
    assert (fast["runtime"].split()[0], plain["runtime"].split()[0]) == ("onnxruntime-genai", "transformers")
    ratios = report["ratio_of_first_to_second"]
    assert set(ratios) == {"load", "size", "peak_memory", "prefill_speed", "decode_speed"}
    assert report["threads"] == 1


# What the runtimes say


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    """Return the handle of the model as the command's passes leave it."""
    from helpers import open_model
    from llmopt.calibration.samples import load_samples
    from llmopt.core.passes import PassContext
    from llmopt.core.progress import Silent
    from llmopt.core.recipe import CalibrationSpec
    from llmopt.core.threads import DEFAULT
    from llmopt.models.text import load_tokenizer
    from llmopt.passes.gptq import Gptq, GptqParams
    from llmopt.pipeline.sweep import run_sweep
    from llmopt.pipeline.threads import fixed_threads

    model = open_model(TINY, tmp_path_factory.mktemp("work"))
    spec = CalibrationSpec(data=str(TINY / "calibration.txt"), samples=16, length=64)
    rows = load_samples(spec, load_tokenizer(TINY), seed=3, reporter=Silent()).rows
    with fixed_threads(DEFAULT):
        run_sweep(model, [Gptq(GptqParams(bits=4, group_size=64))], rows, PassContext(seed=3))
    return model


def test_transformers_alone_opens_it(built, in_memory):
    """Weights equal ours bit for bit, logits within 1e-3."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = built[0] / "out" / "safetensors"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("The hen lays an egg, and the fox", return_tensors="pt")["input_ids"]
    ours = in_memory.materialize()
    with torch.inference_mode():
        logits, expected = model(ids).logits, ours(ids).logits  # the first forward pass unpacks the weights
    assert float((logits - expected).abs().max()) <= 1e-3
    opened = dict(model.named_parameters())
    assert len(in_memory.quantized) == 28
    for layer in in_memory.quantized:
        assert torch.equal(opened[f"{layer}.weight"].data, in_memory.quantized_weight(layer).dequantize()), layer


PROMPTS = ("The hen lays", "Once there was a", "One day the cat")


def test_genai_generates_what_transformers_generates(built, in_memory):
    """Greedy, 32 tokens from each of three prompts, with float32 activations: the same tokens."""
    import torch
    from llmopt.models.text import load_tokenizer
    from llmopt.runtimes.onnx_genai import OnnxGenAI

    tokenizer = load_tokenizer(TINY)
    ours = in_memory.materialize()
    session = OnnxGenAI().open(built[0] / "out" / "onnx-genai")
    same = total = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        made = session.generate(ids, 32)
        with torch.inference_mode():
            for index in range(32):  # teacher-forced: one difference does not make every later token differ
                expected = int(ours(torch.tensor([ids + made[:index]])).logits[0, -1].argmax())
                same += made[index] == expected
                total += 1
    session.close()
    print(f"greedy agreement: {same} of {total} tokens")
    assert same >= 0.97 * total


def test_genai_alone_generates(built):
    """With the package's own generator and tokenizer, as its users call it."""
    import onnxruntime_genai as genai

    model = genai.Model(str(built[0] / "out" / "onnx-genai"))
    tokenizer = genai.Tokenizer(model)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=40, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(tokenizer.encode("The hen lays"))
    while not generator.is_done():
        generator.generate_next_token()
    text = tokenizer.decode(generator.get_sequence(0))
    assert text.startswith("The hen lays")
    assert len(text) > len("The hen lays")


# The recipe's schema


def test_the_schema_judges_recipes(built):
    import yaml
    from jsonschema import Draft202012Validator

    schema = json.loads(llmopt("schema").stdout)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    recipe = yaml.safe_load((built[0] / "recipe.yaml").read_text())
    assert list(validator.iter_errors(recipe)) == []
    bad = [
        {},
        {"model": 3},
        recipe | {"exprots": []},
        recipe | {"passes": [{"gptq": {"bits": 7}}]},
        recipe | {"passes": [{"gtpq": {}}]},
        recipe | {"exports": [{"onnx": {"fus": True}}]},
        recipe | {"calibration": {"data": "x.txt", "samples": 0}},
        recipe | {"seed": -1},
    ]
    for one in bad:
        assert not validator.is_valid(one), one


# Nothing heavy before it is needed


def loaded_by(program, *arguments):
    """Run a program in a fresh interpreter; return which heavy modules it loaded."""
    tail = f"\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    command = [sys.executable, "-c", program + tail, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()[-1].split()


MAIN = "import sys; from llmopt.__main__ import main; main(sys.argv[1:])"


def test_importing_the_package_is_light():
    assert loaded_by("import llmopt") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("quantize", "--help"),
        ("quantize", TINY, "-o", "out", "--group-size", "100"),
        ("quantize", TINY, "-o", "out", "--method", "gptq"),
        ("quantize", TINY, "-o", TINY, "--group-size", "64", "--force"),
        ("quantize", TINY, "--group-size", "64", "--dry-run"),
        ("inspect", TINY),
        ("doctor",),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)).replace(str(TINY), "MODEL"),
)
def test_nothing_heavy_is_loaded(arguments):
    assert loaded_by(MAIN, *arguments) == []


def test_the_example_of_a_smaller_model(tmp_path, monkeypatch):
    """A layer less, most of what that cost won back, four bits, and an engine that generates."""
    monkeypatch.chdir(TINY.parents[1])
    llmopt("run", "examples/smaller.yaml", "-o", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "llmopt.json").read_text())
    depth, learnt, rounded = manifest["passes"]
    assert depth["metrics"]["dropped_blocks_count"] == 1
    before, after = (learnt["metrics"][f"held_out_kl_{when}_nats"] for when in ("before", "after"))
    assert after < 0.4 * before
    assert len(rounded["changed"]) == 7 * 3
    assert manifest["exports"][0]["verification"]["passed"]
    source = (TINY / "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("model.onnx*")) < 0.3 * source
