"""What many tests do: build a recipe, run it, and compare tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmopt.core.errors import UsageError
from llmopt.core.manifest import Manifest
from llmopt.core.progress import Silent
from llmopt.core.quantized import Grid
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.handle import TorchModel
from llmopt.models.locate import locate
from llmopt.models.outline import outline
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest difference, as a share of the largest value, that the order of summation may make."""


def assert_near(got: Any, expected: Any, *, what: str = "", factor: float = 1.0) -> None:
    """Compare tensors, or tuples and dicts that hold them, by the tolerance of their dtype."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor), what
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
        if not expected.is_floating_point():
            assert bool((got == expected).all()), what
            return
        masked = expected.isinf() | (expected <= torch.finfo(expected.dtype).min / 2)  # masks hold minus infinity
        assert bool((got[masked] == expected[masked]).all()), what
        a, b = got[~masked].double(), expected[~masked].double()
        largest = float((a - b).abs().max()) if a.numel() else 0.0
        allowed = factor * TOLERANCE[expected.dtype] * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        assert largest <= allowed, f"{what}: {largest:g} > {allowed:g}"
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), what
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_near(one, other, what=f"{what}[{index}]", factor=factor)
    elif isinstance(expected, dict):
        assert sorted(got) == sorted(expected), what
        for key, value in expected.items():
            assert_near(got[key], value, what=f"{what}.{key}", factor=factor)


def open_model(folder: Path, work: Path) -> TorchModel:
    """Return the handle that the pipeline works with."""
    location = locate(ModelSpec(id=str(folder)))
    checkpoint = Checkpoint(location.folder)
    return TorchModel.create(location, checkpoint, outline(location, checkpoint), work)


def recipe(
    folder: Path, *passes: tuple[str, dict[str, Any]], export: Any = ("safetensors", {}), data: Path | None = None
) -> Recipe:
    """Return a recipe with one export."""
    calibration = None if data is None else CalibrationSpec(data=str(data), samples=6, length=24)
    steps = tuple(Step(name, params) for name, params in passes)
    return Recipe(model=ModelSpec(id=str(folder)), calibration=calibration, passes=steps, exports=(Step(*export),))


def build(made: Recipe, output: Path) -> Manifest:
    """Plan and run a recipe."""
    return run_plan(make_plan(made), output, force=False, reporter=Silent())


def grid(bits: int = 4, group_size: Any = 32, symmetric: bool = True) -> Grid:
    """Return a grid."""
    return Grid(bits=bits, group_size=group_size, symmetric=symmetric)


def refused_plan(made: Recipe) -> str:
    """Return the words with which a recipe is refused, which come with a hint."""
    with pytest.raises(UsageError) as caught:
        make_plan(made)
    assert caught.value.hint
    return str(caught.value)
