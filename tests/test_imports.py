"""Nothing heavy is imported before it is needed. Which modules are loaded is tested, not how long that takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from llmopt.cli.app import COMMANDS

HEAVY = [
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxruntime_genai",
    "onnxscript",
    "numpy",
    "rich",
    "datasets",
    "pyarrow",
    "safetensors",
    "compressed_tensors",
    "accelerate",
    "optimum",
    "huggingface_hub",
    "tokenizers",
    "psutil",
]

PROGRAM = """
import sys
from llmopt.__main__ import main
code = main(sys.argv[1:])
print(code, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def run(*arguments, cwd=None):
    """Run a command line in a fresh interpreter; return its exit code and the heavy packages it loaded."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True, cwd=cwd
    )
    code, *loaded = process.stderr.splitlines()[-1].split()
    return int(code), [name for name in HEAVY if name in loaded], process


def test_help_loads_nothing_heavy():
    code, heavy, process = run("--help")
    assert (code, heavy) == (0, [])
    loaded = process.stderr.split()
    assert "msgspec" not in loaded  # no command is imported, so no parameters either
    assert "yaml" not in loaded


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_nothing_heavy(command):
    code, heavy, _ = run(command, "--help")
    assert (code, heavy) == (0, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["quantize"],
        ["quantize", "model", "--unknown"],
        ["quantize", "model", "--scheme", "w1a1"],
        ["quantize", "model", "-o", "out", "--export", "nonsense"],
        ["quantize", "./no-such-folder", "-o", "out"],
        ["quantize", "./model", "-o", "out", "--group-size", "100"],
        ["plan", "missing.yaml"],
        ["plan", "unknown-pass.yaml"],
        ["plan", "unknown-parameter.yaml"],
        ["plan", "group-size.yaml"],
        ["run", "group-size.yaml"],
    ],
)
def test_refusing_loads_nothing_heavy(tmp_path, arguments):
    write_model(tmp_path / "model")
    recipes = {
        "unknown-pass": "[nonsense]",
        "unknown-parameter": "[rtn: {nonsense: 1}]",
        "group-size": "[rtn: {bits: 4, group_size: 100}]",
    }
    for name, passes in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(f"model: ./model\npasses: {passes}\nexports: [safetensors]\n")
    before = sorted(tmp_path.rglob("*"))
    code, heavy, process = run(*arguments, cwd=tmp_path)
    assert code == 2, process.stderr
    assert heavy == []
    assert "hint: " in process.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["passes"], ["passes", "gptq"], ["schema"], ["inspect", "model"]])
def test_looking_up_loads_nothing_heavy(tmp_path, arguments):
    write_model(tmp_path / "model")
    code, heavy, process = run(*arguments, cwd=tmp_path)
    assert code == 0, process.stderr
    assert heavy == []


def write_model(folder: Path) -> None:
    """Write a Llama of one block whose safetensors file holds zeros, without any library."""
    wide, inner, words = 64, 128, 100
    shapes = {
        "model.embed_tokens.weight": [words, wide],
        "model.norm.weight": [wide],
        "lm_head.weight": [words, wide],
        "model.layers.0.input_layernorm.weight": [wide],
        "model.layers.0.post_attention_layernorm.weight": [wide],
        **{f"model.layers.0.self_attn.{name}_proj.weight": [wide, wide] for name in "qkvo"},
        "model.layers.0.mlp.gate_proj.weight": [inner, wide],
        "model.layers.0.mlp.up_proj.weight": [inner, wide],
        "model.layers.0.mlp.down_proj.weight": [wide, inner],
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": wide,
        "intermediate_size": inner,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 4,
        "vocab_size": words,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
