"""The same recipe gives the same bytes: on one core and on two, with one thread and with two, in another folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
GRID = {"bits": 4, "group_size": 64}
LEARN = {"steps": 6, "batch_size": 4, "length": 32, "held_out": 4}
CAPPED = {"max_drop": 0.5}

DECODER = {
    "rtn": ([{"rtn": GRID}], ["safetensors"]),
    "hqq": ([{"hqq": GRID}], ["safetensors"]),
    "awq-gptq": ([{"awq": {"scales_only": True, **GRID}}, {"gptq": GRID}], ["safetensors"]),
    "autoround": ([{"autoround": {"iterations": 4, **GRID}}], ["safetensors"]),
    "gptq-everywhere": ([{"gptq": GRID}], ["safetensors", "onnx", "onnx-genai"]),
    "activations": (
        ["rotate", "smooth", {"gptq": {"bits": 8, "group_size": "channel"}}, "quantize-activations", "quantize-kv"],
        ["safetensors"],
    ),
    "sparse": ([{"sparsify": {"pattern": "2:4"}}, {"gptq": GRID}], ["safetensors"]),
    "allocate": ([{"allocate-bits": {"budget": "4.5bpw"}}, {"gptq": {"group_size": 64}}], ["safetensors"]),
    "prune": (["prune-vocab", {"prune-depth": {"drop": 1}}, {"prune-width": {"mlp": "25%"}}], ["safetensors"]),
    "distill": ([{"prune-depth": {"layers": [2]}}, {"distill": LEARN}], ["safetensors"]),
    "graph": (["fuse", {"cast-fp16": CAPPED}, {"quantize-weights": {"bits": 4, **CAPPED}}], ["onnx"]),
}
ENCODER = {
    "static": (["remove-padding", "fuse", {"quantize-static": CAPPED}], ["onnx"]),
    "openvino": (["remove-padding", {"quantize-static": CAPPED}], ["openvino"]),
}

WORKER = """
import gc, json, os, sys
from hashlib import sha256
from pathlib import Path

if sys.argv[1] == "1" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from llmopt.__main__ import main

made = {}
for recipe in sorted(Path().glob("*.yaml")):
    if main(["run", str(recipe), "-o", recipe.stem, "-q"]):
        sys.exit(f"{recipe} failed")
    gc.freeze()  # as in conftest.py
    files = {path for path in Path(recipe.stem).rglob("*") if path.is_file() and path.name != "llmopt.run.json"}
    made[recipe.stem] = {str(path): sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    """Return the hashes of all artifacts, as made on one core by one thread and by two."""
    found = []
    for threads, name in ((1, "here"), (2, "over/there")):
        place = tmp_path_factory.mktemp("determinism") / name
        shutil.copytree(TINY, place / "decoder")
        shutil.copytree(family("bert"), place / "encoder")
        for model, recipes in (("decoder", DECODER), ("encoder", ENCODER)):
            for title, (passes, exports) in recipes.items():
                data = {"data": "decoder/calibration.txt", "samples": 16, "length": 64}
                recipe = {"model": model, "calibration": data, "passes": passes, "exports": exports}
                (place / f"{title}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", WORKER, str(threads)]
        ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        found.append(json.loads(ended.stdout.splitlines()[-1]))
    return found


@pytest.mark.parametrize("title", [*DECODER, *ENCODER])
def test_threads_and_folders_change_no_byte(made, title):
    first, second = (hashes[title] for hashes in made)
    assert len(first) > 3
    assert f"{title}/llmopt.json" in first
    assert [name for name in first if first[name] != second.get(name)] == []
    assert list(first) == list(second)
