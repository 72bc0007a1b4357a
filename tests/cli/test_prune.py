"""`llmopt prune`: what it asks of the pipeline, and what it refuses."""

import pytest
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step


def test_everything_at_once_in_the_order_that_works(llmopt, pipeline):
    arguments = "--depth 25% --width mlp=30%,heads=1 --sparsity 2:4 --vocab --calibration wiki.txt --samples 8 --seed 3"
    ended = llmopt("prune", "model", "-o", "out", *arguments.split())
    assert ended.code == 0, ended.err
    assert pipeline["recipe"] == Recipe(
        model=ModelSpec(id="model"),
        calibration=CalibrationSpec(data="wiki.txt", samples=8),
        passes=(
            Step("prune-depth", {"drop": "25%"}),
            Step("prune-width", {"mlp": "30%", "heads": 1}),
            Step("prune-vocab"),
            Step("sparsify", {"pattern": "2:4"}),
        ),
        exports=(Step("safetensors"),),
        seed=3,
    )


def test_options_reach_their_pass(llmopt, pipeline):
    arguments = "--depth 4 --by loss --width hidden=25% --width mlp=64 --multiple 16 --importance activation --no-refit"
    llmopt(
        "prune", "m", "-o", "out", *arguments.split(), "--sparsity", "60%", "--method", "wanda", "--calibration", "t"
    )
    assert [(step.name, step.params) for step in pipeline["recipe"].passes] == [
        ("prune-depth", {"drop": 4, "by": "loss"}),
        ("prune-width", {"hidden": "25%", "mlp": 64, "multiple": 16, "importance": "activation", "refit": False}),
        ("sparsify", {"sparsity": "60%", "method": "wanda"}),
    ]


def test_named_layers_need_no_data(llmopt, pipeline):
    llmopt("prune", "m", "-o", "out", "--layers", "3", "--layers", "4", "--stack", "decoder")
    assert pipeline["recipe"].passes == (Step("prune-depth", {"layers": [3, 4], "stack": "decoder"}),)
    assert pipeline["recipe"].calibration is None


def test_zeros_without_data_are_the_smallest_weights(llmopt, pipeline):
    ended = llmopt("prune", "m", "-o", "out", "--sparsity", "50%")
    assert pipeline["recipe"].passes == (Step("sparsify", {"sparsity": "50%", "method": "magnitude"}),)
    assert "note: no --calibration: the smallest weights go" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "nothing to prune"),
        ("--width", "--width"),
        ("--width mlp", "cannot read `mlp` as a parameter"),
        ("--width neurons=30%", "unknown parameter `neurons`"),
        ("--width multiple=8", "--width has no `multiple`"),
        ("--by loss", "--by needs --depth"),
        ("--depth 2 --importance activation", "--importance needs --width"),
        ("--depth 2 --method wanda", "--method needs --sparsity"),
        ("--sparsity 50% --samples 8", "--samples needs --calibration SPEC"),
        ("--depth 2 --by size", "bad value for --by: size"),
    ],
)
def test_it_refuses(llmopt, pipeline, arguments, message):
    ended = llmopt("prune", "model", "-o", "out", *arguments.split())
    assert ended.code == 2
    assert message in ended.err
    assert "recipe" not in pipeline
