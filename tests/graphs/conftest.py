"""Traced graphs of tiny models, and running graphs in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir


@pytest.fixture(scope="session")
def traced() -> Callable[[str], ir.Model]:
    """Return a family's graph, attention as one node: `traced("bert")`, a copy each time."""
    import torch
    from families import FAMILIES, make_model
    from llmopt.exporters.onnx_trace import trace

    torch.set_num_threads(1)
    made: dict[str, Any] = {}

    def graph(name: str) -> ir.Model:
        if name not in made:
            made[name] = trace(make_model(FAMILIES[name]), cache=FAMILIES[name].is_decoder)
        return made[name].clone()

    return graph


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return the file that torch itself exports of an encoder: `foreign("bert", attention="sdpa", dynamo=False)`."""
    import warnings

    import torch
    from families import FAMILIES, make_model

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("foreign")

    class First(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    def export(name: str, *, attention: str = "eager", dynamo: bool = False) -> Any:
        path = folder / f"{name}-{attention}-{dynamo}.onnx"
        if path.exists():
            return path
        model = make_model(FAMILIES[name])
        model.config._attn_implementation = attention
        sample = (torch.randint(3, 200, (2, 7)), torch.ones(2, 7, dtype=torch.int64))
        names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
        axes = {0: "batch_size", 1: "sequence_length"}
        varying = dict.fromkeys(names["input_names"], axes)
        free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dynamo:
                settings = {"dynamic_shapes": (free, free), "external_data": False, "verbose": False}
            else:
                settings = {"dynamic_axes": varying, "opset_version": 17, "do_constant_folding": False}
            torch.onnx.export(First(model).eval(), sample, path, dynamo=dynamo, **names, **settings)
        return path

    return export
