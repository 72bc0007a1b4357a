"""Models that are not there, damaged, incomplete, of an unknown kind, or full of numbers that are none."""

import json
import shutil
import struct

import pytest
from broken import TINY, copy_tiny, reconfigure, reheader, retensor, zeros

DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGED = "the checkpoint is damaged: fetch or save it again"
INCOMPLETE = "the checkpoint is incomplete"
CALIBRATION = ("--calibration", TINY / "calibration.txt", "--samples", "8", "--length", "32")
RTN = ("--group-size", "64")


@pytest.mark.parametrize(
    ("path", "what", "hint"),
    [
        ("./nothing", "no model at `./nothing`", "give a local folder or a hub id such as org/name"),
        ("/nothing/there", "no model at `/nothing/there`", "give a local folder"),
        ("./modle", "no model at `./modle`", "did you mean `model`?"),
        ("model/config.json", "`model/config.json` is a file, not a model folder", "give the folder that holds config"),
        ("empty", "`empty` is not a model folder", "save_pretrained"),
    ],
)
def test_no_model_there(shell, model, path, what, hint):
    (shell.folder / "empty").mkdir()
    shell.builds_nothing("quantize", path, *RTN, code=2, what=what, hint=hint)


def test_a_hub_id_that_cannot_be_fetched(shell):
    shell.builds_nothing("quantize", "org/nothing", *RTN, code=1, what="no model at `org/nothing`", hint="hub id")


def cut(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def write(folder, data):
    (folder / "model.safetensors").write_bytes(data)


def lengthen(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


SHARDS = {
    "garbage": (lambda folder: write(folder, b"no safetensors" * 100), "its header says"),
    "empty": (lambda folder: write(folder, b""), "its header is cut short, the file has 0"),
    "no-json": (lambda folder: write(folder, struct.pack("<Q", 8) + b"{nope!!}"), "its header cannot be read"),
    "truncated-data": (lambda folder: cut(folder, 1_000_000), "its tensors take 2757120 bytes, the file holds"),
    "truncated-header": (lambda folder: cut(folder, 500), "its header says"),
    "too-long": (lambda folder: write(folder, (folder / "model.safetensors").read_bytes() + b"x"), "the file holds"),
    "length-lies": (lambda folder: lengthen(folder, 1 << 62), "its header says 4611686018427387904 bytes"),
    "shape-lies": (lambda folder: reheader(folder, lambda h: h[DOWN].update(shape=[128, 512])), "takes 262144 bytes"),
    "offsets-lie": (lambda folder: reheader(folder, lambda h: h[DOWN].update(data_offsets=[0, 9**9])), DOWN),
    "negative": (lambda folder: reheader(folder, lambda h: h[DOWN].update(shape=[-128, -256])), DOWN),
    "unknown-dtype": (lambda folder: reheader(folder, lambda h: h[DOWN].update(dtype="Q4")), "the unknown dtype 'Q4'"),
    "no-offsets": (lambda folder: reheader(folder, lambda h: h[DOWN].pop("data_offsets")), "data_offsets"),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_a_damaged_shard(shell, model, damage):
    change, where = SHARDS[damage]
    change(model)
    what = "model.safetensors is damaged"
    shell.builds_nothing("quantize", model, *RTN, code=1, what=what, where=where, hint=DAMAGED)


@pytest.mark.parametrize(
    ("index", "what", "hint"),
    [
        ({"weight_map": {DOWN: "../other.safetensors"}}, "points outside its folder", "beside the index"),
        ({"weight_map": {DOWN: "/etc/passwd"}}, "points outside its folder", "beside the index"),
        ({"weight_map": {DOWN: "model-2.safetensors"}}, "shard model-2.safetensors is missing", INCOMPLETE),
        ({"weight_map": {"x": "model.safetensors"}}, "weight `x` is missing", INCOMPLETE),
        ({"weight_map": []}, "model.safetensors.index.json is damaged", ""),
        ({}, "model.safetensors.index.json is damaged", ""),
    ],
)
def test_a_bad_index(shell, model, index, what, hint):
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    shell.builds_nothing("quantize", model, *RTN, code=1, what=what, hint=hint)


def test_no_weights(shell, model):
    (model / "model.safetensors").unlink()
    shell.builds_nothing("quantize", model, *RTN, code=2, what="`model` holds no weights", hint="fetch the weights")


def test_only_pickles(shell, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    shell.builds_nothing(
        "quantize", model, *RTN, code=2, what="`model` holds pickled weights only", hint="convert it once"
    )


BELONG = "another config.json"
MISFITS = {
    "weight-missing": (lambda m: retensor(m, lambda t: t.pop(DOWN)), f"weight `{DOWN}` is missing"),
    "norm-missing": (lambda m: retensor(m, lambda t: t.pop("model.norm.weight")), "weight `model.norm.weight` is mis"),
    "other-shape": (
        lambda m: retensor(m, lambda t: t.update({DOWN: zeros(128, 512)})),
        f"weight `{DOWN}` has another shape than config.json says",
    ),
    "other-config": (lambda m: reconfigure(m, intermediate_size=512), "has another shape than config.json says"),
    "more-blocks": (lambda m: reconfigure(m, num_hidden_layers=6), "weight `model.layers.4."),
    "fewer-blocks": (lambda m: reconfigure(m, num_hidden_layers=3), "has no place for, such as `model.layers.3."),
}


@pytest.mark.parametrize("damage", MISFITS)
def test_weights_that_do_not_fit_the_config(shell, model, damage):
    change, what = MISFITS[damage]
    change(model)
    shell.builds_nothing("quantize", model, *RTN, code=1, what=what, hint=BELONG)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("command", ["rtn", "gptq", "export"])
@pytest.mark.parametrize("name", [DOWN, "model.embed_tokens.weight"])
def test_a_weight_that_is_no_number(shell, model, value, command, name):
    retensor(model, lambda tensors: tensors[name].view(-1)[5].fill_(value))
    arguments = {"rtn": ("quantize", model, *RTN), "gptq": ("quantize", model, *RTN, *CALIBRATION)}
    shell.builds_nothing(
        *arguments.get(command, ("export", model)),
        code=1,
        what=f"weight `{name}` holds NaN or Inf",
        where="1 of ",
        hint=DAMAGED,
    )


def overflow(folder, factor):
    name = "model.layers.2.post_attention_layernorm.weight"
    retensor(folder, lambda tensors: tensors[name].mul_(factor))


@pytest.mark.parametrize(
    ("factor", "layer"), [(1e30, "model.layers.2.mlp.down_proj"), (1e38, "model.layers.2.mlp.gate_proj")]
)
def test_an_activation_that_overflows_names_the_layer(shell, model, factor, layer):
    overflow(model, factor)
    shell.builds_nothing(
        "quantize",
        model,
        *RTN,
        *CALIBRATION,
        code=1,
        what=f"the input of `{layer}` holds NaN or Inf",
        where="calibration batch 1 of 1",
        hint="check its weights",
    )


@pytest.mark.parametrize("command", [("quantize", *RTN), ("export",)], ids=lambda command: command[0])
def test_a_model_that_overflows_is_not_exported(shell, model, command):
    overflow(model, 1e30)
    shell.builds_nothing(
        command[0],
        model,
        *command[1:],
        code=1,
        what="the output of `model.layers.2` holds NaN or Inf",
        hint="check its weights",
    )


ARCHITECTURES = {
    "unknown-type": ({"model_type": "nonsense"}, 2, "an architecture that transformers", "check `model_type`"),
    "no-type": ({"model_type": ...}, 2, "an architecture that transformers", "check `model_type`"),
    "unknown-name": ({"architectures": ["Nonsense"]}, 2, "unknown architecture `Nonsense`", "such as LlamaForCausalLM"),
    "no-name": ({"architectures": ...}, 2, "config.json names no architecture", "such as LlamaForCausalLM"),
    "no-list": ({"architectures": "Llama"}, 1, "`architectures` in config.json is not a list", "LlamaForCausalLM"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, 2, "quantized already", "floating-point model"),
    "own-code": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "model_type": "x", "architectures": ["X"]},
        2,
        "`model` needs Python code of its own (X)",
        "--trust-remote-code",
    ),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_an_architecture_that_cannot_be_worked_on(shell, model, case):
    changes, code, what, hint = ARCHITECTURES[case]
    reconfigure(model, **changes)
    shell.builds_nothing("quantize", model, *RTN, code=code, what=what, hint=hint)


@pytest.mark.parametrize("changes", [{"architectures": ["LlamaConfig"]}, {"hidden_size": "wide"}], ids=str)
def test_a_config_that_makes_no_model(shell, model, changes):
    reconfigure(model, **changes)
    ended = shell.run("quantize", model, *RTN, "-o", "out")
    assert ended.code in {1, 2}
    assert "error: " in ended.err
    assert "hint: " in ended.err
    assert "internal error" not in ended.err
    assert not (shell.folder / "out").exists()


@pytest.mark.parametrize("text", [b"{nope", b"[]", b"\xff\xfe"], ids=["no-json", "no-object", "no-utf8"])
def test_a_config_that_is_none(shell, model, text):
    (model / "config.json").write_bytes(text)
    shell.builds_nothing("quantize", model, *RTN, code=1, what="config.json is not", hint="")


def test_an_artifact_of_ours_is_quantized_already(shell, artifact):
    shutil.copytree(artifact, "done")
    shell.builds_nothing("quantize", "done", *RTN, code=2, what="`done` is quantized already", hint="floating-point")


# Tokenizer


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def test_gptq_needs_a_tokenizer(shell, model):
    without_tokenizer(model)
    shell.builds_nothing(
        "quantize", model, *RTN, *CALIBRATION, code=2, what="`model` has no tokenizer", hint="or use rtn"
    )


def test_genai_needs_a_tokenizer(shell, model):
    without_tokenizer(model)
    arguments = ("quantize", model, *RTN, "--export", "onnx-genai")
    shell.builds_nothing(*arguments, code=2, what="needs a tokenizer", hint="`onnx` export")


def test_rounding_needs_no_tokenizer(shell, model):
    without_tokenizer(model)
    assert shell.run("quantize", model, *RTN, "-o", "out").code == 0
    assert shell.run("verify", "out").code == 0


@pytest.mark.parametrize("text", ["{}", "not json"])
def test_a_damaged_tokenizer(shell, model, text):
    (model / "tokenizer.json").write_text(text)
    arguments = ("quantize", model, *RTN, *CALIBRATION)
    shell.builds_nothing(*arguments, code=2, what="no tokenizer can be loaded from `model`", hint="tokenizer.json")


def test_a_tokenizer_of_another_model(shell, model):
    retensor(model, lambda tensors: tensors.update({"model.embed_tokens.weight": zeros(64, 128)}))
    reconfigure(model, vocab_size=64)
    arguments = ("quantize", model, *RTN, *CALIBRATION)
    what = "the model cannot take the calibration samples"
    shell.builds_nothing(*arguments, code=1, what=what, hint="the tokenizer beside the weights")


# Layers


@pytest.mark.parametrize("size", [100, 256, 12])
def test_a_group_size_that_does_not_divide(shell, model, size):
    arguments = ("quantize", model, "--group-size", size)
    shell.builds_nothing(
        *arguments,
        code=2,
        what="cannot group `model.layers.0.mlp.",
        where=f"are not a multiple of group size {size}",
        hint="use --group-size 128, or leave it out with --ignore",
    )


def test_a_group_size_that_divides_after_the_layer_is_left_out(shell, model):
    arguments = ("quantize", model, "--group-size", "100", "--ignore", "model.*", "--dry-run")
    assert shell.run(*arguments).code == 0


@pytest.mark.parametrize(
    ("pattern", "what", "hint"),
    [
        ("*.down_prj", "pattern `*.down_prj` matches no layer", "did you mean `down_proj`?"),
        ("re:(", "`re:(` is not a regular expression", "a glob such as"),
    ],
)
def test_a_pattern_that_leaves_nothing_out(shell, pattern, what, hint):
    copy_tiny(shell.folder / "model")
    shell.builds_nothing("quantize", "model", *RTN, "--ignore", pattern, code=2, what=what, hint=hint)
