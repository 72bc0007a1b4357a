"""What each command asks of the pipeline, and what it shows."""

import json
from pathlib import Path

import pytest
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step


def test_quantize_without_calibration_rounds(llmopt, pipeline):
    ended = llmopt("quantize", "model", "-o", "out")
    assert ended.code == 0
    assert pipeline["recipe"] == Recipe(
        model=ModelSpec(id="model"), passes=(Step("rtn", {"bits": 4}),), exports=(Step("safetensors"),)
    )
    assert pipeline["run"] == {"output": Path("out"), "force": False}
    assert "note: no --calibration: rounding to nearest" in ended.err


def test_quantize_with_calibration_takes_gptq(llmopt, pipeline):
    arguments = "--calibration wiki.txt --samples 64 --length 256 --scheme w3a16 --group-size 32 --asymmetric --seed 7"
    llmopt("quantize", "model", "-o", "out", *arguments.split(), "--ignore", "lm_head", "--ignore", "*.0.*", "--force")
    assert pipeline["recipe"] == Recipe(
        model=ModelSpec(id="model"),
        calibration=CalibrationSpec(data="wiki.txt", samples=64, length=256),
        passes=(Step("gptq", {"bits": 3, "group_size": 32, "symmetric": False, "ignore": ["lm_head", "*.0.*"]}),),
        exports=(Step("safetensors"),),
        seed=7,
    )
    assert pipeline["run"]["force"]


def test_quantize_tells_the_model_options_on(llmopt, pipeline):
    llmopt("quantize", "org/model", "-o", "out", "--revision", "v2", "--trust-remote-code", "--method", "rtn")
    assert pipeline["recipe"].model == ModelSpec(id="org/model", revision="v2", trust_remote_code=True)


def test_overrides_are_written_one_by_one(llmopt, pipeline):
    arguments = ["--override", "*.down_proj:bits=8,group_size=64", "--override", "re:.*layers.0.*:ignore=true"]
    llmopt("quantize", "model", "-o", "out", *arguments)
    assert pipeline["recipe"].passes[0].params["overrides"] == [
        {"pattern": "*.down_proj", "bits": 8, "group_size": 64},
        {"pattern": "re:.*layers.0.*", "ignore": True},
    ]


def test_a_budget_puts_the_allocation_before_the_method(llmopt, pipeline):
    arguments = "--calibration wiki.txt --budget 4.5bpw --choices 2 --choices 4 --measure kl --method hqq"
    llmopt("quantize", "model", "-o", "out", *arguments.split())
    assert pipeline["recipe"].passes == (
        Step("allocate-bits", {"budget": "4.5bpw", "choices": [2, 4], "measure": "kl"}),
        Step("hqq", {"bits": 4}),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--override *.down_proj", "cannot read `*.down_proj`"),
        ("--override *.down_proj:bits=7", "bad value for bits: 7"),
        ("--override *.down_proj:bit=8", "unknown parameter `bit`"),
        ("--budget 4.5bpw", "--budget needs calibration data"),
        ("--measure kl", "--measure needs a budget"),
        ("--method autoround", "--method autoround needs calibration data"),
        ("--scheme w4a9", "unknown scheme `w4a9`"),
        ("--scheme w9a16", "unknown scheme `w9a16`"),
        ("--method awk", "unknown method `awk`"),
        ("--method gptq", "--method gptq needs calibration data"),
        ("--samples 3", "--samples needs calibration data"),
        ("--damping 0.1", "--damping does not apply to --method rtn"),
        ("--kv-cache fp9", "bad value for --kv-cache: fp9"),
        ("--dtype int8", "bad value for --dtype: int8"),
        ("--scheme w8a8-int8 --activations tok", "bad value for --activations: tok"),
        ("--activations tensor", "--activations does not apply to --scheme w4a16"),
        ("--observer mse", "--observer does not apply to --scheme w4a16"),
        ("--group-size chanel", "bad value for --group-size: chanel"),
        ("--group-size 0", "bad value for --group-size: 0"),
        ("--export onx", "unknown export `onx`"),
        ("--export safetensors:nothing=1", "unknown parameter `nothing`"),
        ("--export safetensors:nothing", "cannot read `nothing` as a parameter"),
    ],
)
def test_quantize_refuses(llmopt, pipeline, arguments, message):
    ended = llmopt("quantize", "model", "-o", "out", *arguments.split())
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {message}\n")
    assert "hint: " in ended.err or "expected " in ended.err
    assert "run" not in pipeline


def test_an_option_of_another_method_is_refused_by_name(llmopt, pipeline):
    ended = llmopt("quantize", "m", "-o", "o", "--method", "rtn", "--damping", "0.1")
    assert ended.err == "error: --damping does not apply to --method rtn\nhint: it belongs to --method gptq\n"


def test_an_output_is_needed(llmopt, pipeline):
    ended = llmopt("quantize", "model")
    assert ended.code == 2
    assert ended.err.startswith("error: no output folder given\n")


def test_a_dry_run_shows_the_plan_and_runs_nothing(llmopt, pipeline, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    ended = llmopt("quantize", "model", "--dry-run", "--save-recipe", str(recipe))
    assert ended.code == 0
    assert "Estimates" in ended.out
    assert "lm_head: not in a repeated block" in ended.out
    assert recipe.exists()
    assert "run" not in pipeline


def test_save_recipe_runs_all_the_same(llmopt, pipeline, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    assert llmopt("quantize", "model", "-o", "out", "--save-recipe", str(recipe)).code == 0
    assert recipe.exists()
    assert "run" in pipeline


def test_a_refused_recipe_is_not_saved(llmopt, pipeline, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    assert llmopt("quantize", "missing", "-o", "out", "--save-recipe", str(recipe)).code == 2
    assert not recipe.exists()


def test_export_changes_no_weights_unless_asked(llmopt, pipeline):
    llmopt("export", "model", "-o", "out", "--export", "onnx")
    assert pipeline["recipe"] == Recipe(model=ModelSpec(id="model"), exports=(Step("onnx"),))
    llmopt("export", "model", "-o", "out", "--dtype", "float16")
    assert pipeline["recipe"].passes == (Step("cast", {"dtype": "float16"}),)


def test_run_names_its_output_like_the_recipe(llmopt, pipeline):
    pipeline["loaded"] = Recipe(model=ModelSpec(id="model"), exports=(Step("onnx"),))
    assert llmopt("run", "recipes/int4.yaml").code == 0
    assert pipeline["run"]["output"] == Path("int4")
    assert llmopt("run", "int4.yaml", "-o", "there").code == 0
    assert pipeline["run"]["output"] == Path("there")
    assert llmopt("run", "recipe").code == 2


def test_plan(llmopt, pipeline):
    pipeline["loaded"] = Recipe(model=ModelSpec(id="model"), exports=(Step("onnx"),))
    ended = llmopt("plan", "recipe.yaml", "--json")
    assert json.loads(ended.out)["peak_bytes"] == 300_000_000


def test_the_summary_says_what_was_made(llmopt, pipeline):
    out = llmopt("quantize", "model", "-o", "out", "--export", "safetensors", "--export", "onnx").out
    for expected in (
        "878.9 KiB (21.8 % of the source)",
        "equal",
        "3.14e-06",
        "99.95 %",
        "gptq: " if "gptq" in out else "rtn: lm_head: not in a repeated block",
        'AutoModelForCausalLM.from_pretrained("out/safetensors")',
        'InferenceSession("out/onnx/model.onnx")',
    ):
        assert expected in out


def test_quiet_prints_nothing(llmopt, pipeline):
    assert llmopt("quantize", "model", "-o", "out", "-q") == (0, "", "")


def test_quiet_keeps_figures_that_were_asked_for(llmopt, pipeline):
    ended = llmopt("bench", "model", "-q")
    assert ended.out
    assert ended.err == ""


@pytest.mark.parametrize(
    ("arguments", "passes"),
    [
        ("", [{"remove-padding": {"required": False}}, "fuse"]),
        ("--batch 1 --sequence 64 --no-remove-padding", ["fuse", {"fix-shapes": {"batch": 1, "sequence": 64}}]),
        ("--target gpu", [{"fuse": {"target": "gpu"}}, "cast-fp16"]),
        (
            "--int8 dynamic --no-remove-padding",
            ["fuse", "quantize-dynamic", {"quantize-weights": {"products": "none", "embeddings": 8}}],
        ),
        (
            "--target edge --calibration text.txt --sequence 64",
            [
                "fold",
                "simplify",
                "quantize-static",
                {"quantize-weights": {"products": "none", "embeddings": 8, "operators": "standard"}},
                {"fix-shapes": {"sequence": 64}},
            ],
        ),
    ],
)
def test_optimize_chooses_passes_by_target(llmopt, pipeline, arguments, passes):
    llmopt("optimize", "model", "-o", "out", *arguments.split())
    found = pipeline["recipe"].to_dict()["passes"]
    assert [step if isinstance(step, str) else next(iter(step)) for step in found] == [
        step if isinstance(step, str) else next(iter(step)) for step in passes
    ]
    for step, expected in zip(found, passes, strict=True):
        if not isinstance(expected, str):
            ((name, params),) = expected.items()
            assert params.items() <= step[name].items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--target tpu", "bad value for --target: tpu"),
        ("--int8 fast", "bad value for --int8: fast"),
        ("--target gpu --int8 dynamic", "--int8 dynamic is for processors"),
        ("--target edge", "--target edge needs calibration data"),
        ("--int8 static", "--int8 static needs calibration data"),
        ("--target gpu --groups 4", "--groups needs padding to be removed"),
    ],
)
def test_optimize_refuses(llmopt, pipeline, arguments, message):
    ended = llmopt("optimize", "model", "-o", "out", *arguments.split())
    assert ended.code == 2
    assert message in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        "quantize model -o out",
        "export model -o out --export onnx",
        "verify out",
        "eval out --data x.txt",
        "bench out --against model",
        "inspect out",
        "doctor",
        "demo",
        "passes",
        "passes gptq",
        "schema",
    ],
)
def test_json_is_one_document_on_stdout(llmopt, pipeline, arguments):
    extra = [] if arguments == "schema" else ["--json"]
    ended = llmopt(*arguments.split(), *extra)
    assert ended.code == 0
    json.loads(ended.out)


def test_passes_lists_every_pass_and_exporter(llmopt):
    from llmopt.exporters import EXPORTERS
    from llmopt.passes import PASSES

    out = llmopt("passes").out
    for name in [*PASSES, *EXPORTERS]:
        assert f"  {name} " in out


def test_passes_describes_one(llmopt):
    out = llmopt("passes", "gptq").out
    assert "needs" in out
    assert "group_size" in out


def test_eval_and_bench_pass_their_options_on(llmopt, pipeline):
    llmopt("eval", "p", "--data", "d.csv", "--column", "c", "--length", "64", "--limit", "9", "-q")
    arguments, named = pipeline["report"]
    assert arguments == ("p",)
    options = named["options"]
    assert (options.data, options.columns, options.task) == ("d.csv", {"": "c"}, None)
    assert (options.samples.length, options.samples.limit) == (64, 9)
    llmopt("bench", "p", "--against", "q", "--threads", "2", "--prompt-tokens", "16", "--new-tokens", "4")
    assert pipeline["report"][1]["against"] == "q"
    assert pipeline["report"][1]["prompt_tokens"] == 16


def test_infer_tells_its_options_on(llmopt, pipeline):
    arguments = "--batching dp --batch-size 8 --max-length 64 --pair-column other --threads 2 --force"
    ended = llmopt("infer", "artifact", "--input", "texts.csv", "-o", "out.jsonl", *arguments.split())
    assert ended.code == 0, ended.err
    (path,), named = pipeline["report"]
    assert (path, named["data"], named["output"], named["force"]) == ("artifact", "texts.csv", Path("out.jsonl"), True)
    options = named["options"]
    assert (options["max_length"], options["pair_column"], options["threads"]) == (64, "other", 2)
    assert (options["batching"].batching, options["batching"].batch_size) == ("dp", 8)


def test_infer_leaves_batching_to_the_pipeline(llmopt, pipeline):
    assert llmopt("infer", "artifact", "--input", "texts.csv", "-o", "out.jsonl").code == 0
    assert pipeline["report"][1]["options"]["batching"] is None


@pytest.mark.parametrize("arguments", ["--batching all", "--batch-size 0", "--max-batch-tokens x", "--max-length 1"])
def test_infer_refuses(llmopt, pipeline, arguments):
    ended = llmopt("infer", "artifact", "--input", "texts.csv", "-o", "out.jsonl", *arguments.split())
    assert (ended.code, ended.out) == (2, "")
    assert arguments.split()[0] in ended.err
    assert "report" not in pipeline
