"""Recipes and options that cannot work."""

from pathlib import Path

import pytest
from broken import TINY

MODEL = f"model: {TINY}\n"
CALIBRATION = f"calibration: {{data: {TINY / 'calibration.txt'}, samples: 8, length: 32}}\n"
EXPORTS = "exports: [safetensors]\n"

FILES = {
    "no-yaml": ("a: [b", "is not valid YAML", "mend the recipe there"),
    "no-utf-8": (b"\xff\xfe", "is not UTF-8", "give a recipe in YAML"),
    "binary": (b"\0\1\2", "is not valid YAML", "mend the recipe there"),
    "code": (MODEL + "passes: !!python/object/apply:os.getcwd []\n", "which no parameter is", "into quotes"),
    "list": ("- a\n", "a recipe is a mapping", "its keys are model,"),
    "scalar": ("model\n", "a recipe is a mapping", "its keys are model,"),
    "empty": ("", "a recipe is a mapping", "its keys are model,"),
    "unknown-key": (MODEL + "exprots: [safetensors]\n", "unknown key `exprots`", "did you mean `exports`?"),
    "key-twice": (MODEL + EXPORTS + "exports: [onnx]\n", "`exports` stands twice", "keep one"),
    "parameter-twice": (
        MODEL + "passes: [rtn: {bits: 4, bits: 8}]\n" + EXPORTS,
        "`bits` stands twice",
        "keep one",
    ),
    "no-model": ("passes: [rtn]\n" + EXPORTS, "the recipe names no model", "add a line `model: PATH`"),
    "model-that-is-no-name": ("model: 3\n" + EXPORTS, "bad value in the parameters", "write a mapping with id"),
    "unknown-model-key": ("model: {id: x, rev: y}\n" + EXPORTS, "unknown parameter `rev`", "did you mean `revision`?"),
    "no-exports": (MODEL + "passes: [rtn]\n", "nothing to export", "name an export: "),
    "seed": (MODEL + EXPORTS + "seed: x\n", "seed must be a whole number", "seed: 1"),
    "negative-seed": (MODEL + EXPORTS + "seed: -1\n", "seed must be a whole number, at least 0", "seed: 1"),
    "unknown-pass": (MODEL + "passes: [gtpq]\n" + EXPORTS, "unknown pass `gtpq`", "did you mean `gptq`?"),
    "unknown-export": (MODEL + "exports: [safetensor]\n", "unknown export `safetensor`", "did you mean `safetensors`?"),
    "unknown-parameter": (
        MODEL + "passes: [rtn: {group_sise: 64}]\n" + EXPORTS,
        "unknown parameter `group_sise`",
        "did you mean `group_size`?",
    ),
    "bits": (MODEL + "passes: [rtn: {bits: 7}]\n" + EXPORTS, "bad value", "bits is one of 2, 3, 4, 5, 6, 8"),
    "group-size": (
        MODEL + "passes: [rtn: {group_size: big}]\n" + EXPORTS,
        "bad value",
        "group_size is a number, or one of block, channel, tensor",
    ),
    "no-list": (MODEL + "passes: rtn\n" + EXPORTS, "expected a list", "write one `- name:"),
    "two-in-one": (MODEL + "passes: [{rtn: {}, gptq: {}}]\n" + EXPORTS, "a step is a name", "`- gptq: {bits: 4}`"),
    "parameters-as-a-list": (MODEL + "passes: [rtn: [4]]\n" + EXPORTS, "a step is a name", "`- gptq: {bits: 4}`"),
    "export-twice": (MODEL + "exports: [onnx, onnx]\n", "`onnx` is exported twice", "one folder"),
    "cast-after-gptq": (
        MODEL + CALIBRATION + "passes: [gptq: {group_size: 64}, cast: {dtype: float16}]\n" + EXPORTS,
        "`cast` cannot come after `gptq`",
        "put `cast` first",
    ),
    "rtn-twice": (
        MODEL + "passes: [rtn: {group_size: 64}, rtn: {group_size: 64}]\n" + EXPORTS,
        "`rtn` cannot come after `rtn`",
        "keep one of the two",
    ),
    "gptq-without-data": (
        MODEL + "passes: [gptq: {group_size: 64}]\n" + EXPORTS,
        "`gptq` needs calibration data",
        "`calibration: {data: FILE}` in the recipe",
    ),
    "samples": (
        MODEL + "calibration: {data: x.txt, samples: 0}\n" + EXPORTS,
        "bad value in the parameters",
        "How many samples",
    ),
    "calibration-that-is-a-name": (MODEL + "calibration: x.txt\n" + EXPORTS, "bad value", "write a mapping with data"),
    "nothing-to-pack": (
        MODEL + "exports: [safetensors: {format: compressed-tensors}]\n",
        "nothing to pack: no pass quantizes the weights",
        "rtn or gptq",
    ),
    "no-runtime-for-it": (
        MODEL + "passes: [rtn: {group_size: tensor, symmetric: false}]\n" + EXPORTS,
        "no asymmetric weights with one scale a tensor",
        "use --group-size channel, or --symmetric",
    ),
}


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("case", FILES)
def test_a_recipe_that_cannot_work(shell, case, command):
    content, what, hint = FILES[case]
    Path("recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    if command == "plan":
        shell.refuses("plan", "recipe.yaml", code=2, what=what, hint=hint)
    else:
        shell.builds_nothing("run", "recipe.yaml", code=2, what=what, hint=hint)


def test_no_recipe_there(shell):
    Path("int4.yaml").write_text(MODEL)
    shell.refuses("plan", "int5.yaml", code=2, what="no recipe at `int5.yaml`", hint="did you mean `int4.yaml`?")
    Path("int4.yaml").unlink()
    shell.refuses("plan", "int5.yaml", code=2, what="no recipe at `int5.yaml`", hint="--save-recipe")
    shell.refuses("plan", ".", code=2, what="cannot read the recipe `.`", hint="--save-recipe")


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (("--scheme", "int7"), "unknown scheme `int7`", "known: w2a16"),
        (("--scheme", "w7a16"), "unknown scheme `w7a16`", "did you mean `w8a16`?"),
        (("--method", "awqq"), "unknown method `awqq`", "gptq"),
        (("--export", "safetensor"), "unknown export `safetensor`", "did you mean `safetensors`?"),
        (("--export", "onnx:fus=false"), "unknown parameter `fus`", "did you mean `fuse`?"),
        (("--export", "onnx:fuse=maybe"), "bad value for fuse: maybe", "for example fuse=true"),
        (("--export", "safetensors", "--export", "safetensors"), "`safetensors` is exported twice", "one folder"),
        (("--group-size", "big"), "bad value for --group-size: big", "--group-size takes N|block|channel|tensor"),
        (("--grup-size", "8"), "unknown option --grup-size", "did you mean `--group-size`?"),
        (("--damping", "0.1"), "--damping does not apply to --method rtn", "it belongs to --method gptq"),
    ],
)
def test_an_option_that_cannot_work(shell, options, what, hint):
    shell.builds_nothing("quantize", TINY, *options, code=2, what=what, hint=hint)
