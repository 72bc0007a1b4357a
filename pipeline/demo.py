"""`llmopt demo`: the main job on the bundled model, with the figures that matter, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.ends import scratch
from ..core.errors import LlmoptError
from ..core.manifest import Manifest
from ..core.progress import Reporter
from ..core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from .bench import bench
from .measuring.evaluate import evaluate
from .output import check_output
from .plan import make_plan
from .run import run_plan

_LENGTH = 255
_SAMPLES, _CALIBRATION_LENGTH = 64, 256
_GRID = {"bits": 4, "group_size": 64}


def demo(output: Path, *, force: bool, reporter: Reporter) -> dict[str, Any]:
    """Quantize the bundled model to int4 with GPTQ, export it twice, verify, and measure before and after.

    Args:
        output: the folder to write.
        force: replace what an earlier demo wrote.
        reporter: shown progress.

    Raises:
        UsageError: the output exists.
        UnmetError: a verification failed.
    """
    model = bundled_model()
    check_output(output, force=force)
    data = str(model / "heldout.txt")
    reporter.note("1 of 3: int4 by rounding to nearest, to have something to compare with")
    with scratch() as folder:
        rounded = folder / "rtn"
        run_plan(make_plan(_recipe(model, "rtn", ["safetensors"])), rounded, force=False, reporter=reporter)
        rtn = _evaluate(rounded, data, reporter)
    reporter.note("2 of 3: int4 by GPTQ on calibration text, exported and verified in both runtimes")
    recipe = _recipe(model, "gptq", ["safetensors", "onnx-genai"])
    manifest = run_plan(make_plan(recipe), output, force=force, reporter=reporter)
    reporter.note("3 of 3: the same text through each artifact, and their speed, measured in turns")
    return {"artifact": str(output), "comparison": _compare(model, output, rtn, data, reporter), **_proof(manifest)}


def bundled_model() -> Path:
    """Return the folder of the bundled model: in the repository, or installed with the package.

    Raises:
        LlmoptError: it is in neither.
    """
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "examples" / "tiny-llama", here / "tiny_llama"):
        if (folder / "config.json").is_file():
            return folder
    raise LlmoptError("the bundled model is missing", where=str(here), hint="install llmopt again")


def _recipe(model: Path, method: str, exports: list[str]) -> Recipe:
    text = str(model / "calibration.txt")
    calibration = CalibrationSpec(data=text, samples=_SAMPLES, length=_CALIBRATION_LENGTH)
    return Recipe(
        model=ModelSpec(id=str(model)),
        calibration=calibration,
        passes=(Step(method, dict(_GRID)),),
        exports=tuple(Step(name) for name in exports),
    )


def _evaluate(path: Path, data: str, reporter: Reporter) -> dict[str, Any]:
    return evaluate(str(path), data=data, column=None, length=_LENGTH, limit=None, reporter=reporter)


def _compare(model: Path, output: Path, rtn: dict[str, Any], data: str, reporter: Reporter) -> list[dict[str, Any]]:
    packed, genai = output / "safetensors", output / "onnx-genai"
    quantized = _evaluate(packed, data, reporter)
    served = _evaluate(genai, data, reporter)
    speed = bench(
        str(genai), against=str(model), repeats=3, prompt_tokens=128, new_tokens=64, threads=None, reporter=reporter
    )
    fast, plain = speed["measured"]
    return [
        _row("float32, transformers", _weights(model), quantized["source"], against=False, speed=plain),
        _row("int4 rtn, transformers", _weights(packed), rtn),
        _row("int4 gptq, transformers", _weights(packed), quantized),
        _row("int4 gptq, ONNX Runtime GenAI", _weights(genai), served, speed=fast),
    ]


def _row(
    name: str, size: int | None, scores: dict[str, Any], *, against: bool = True, speed: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "model": name,
        "size_bytes": size,
        "perplexity": scores["perplexity"],
        "increase_share": scores["source"]["perplexity_increase_share"] if against else None,
        "mean_kl_nats": scores["source"]["mean_kl_nats"] if against else None,
        "prefill_tokens_per_second": speed and speed["prefill_tokens_per_second"],
        "decode_tokens_per_second": speed and speed["decode_tokens_per_second"],
    }


def _weights(folder: Path) -> int:
    """Return the bytes of weight files; the tokenizer would hide the difference in a model this small."""
    suffixes = {".safetensors", ".onnx", ".data"}
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in suffixes)


def _proof(manifest: Manifest) -> dict[str, Any]:
    return {
        "verified": [
            {
                "export": record.name,
                "runtime": parity.runtime,
                "weights_equal": parity.weights_equal,
                "max_difference": parity.max_difference,
                "mean_kl_nats": parity.mean_kl,
                "top1_agreement": parity.top1_agreement,
            }
            for record in manifest.exports
            if (parity := record.verification) is not None
        ]
    }
