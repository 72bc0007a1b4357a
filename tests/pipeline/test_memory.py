"""The estimate of peak memory: what it follows, and what a limit does to it."""

import msgspec
import pytest
from llmopt.core.errors import UsageError
from llmopt.core.facts import LinearFacts, ModelFacts
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from llmopt.pipeline.memory import _MARGIN, estimate
from llmopt.pipeline.steps import exporters_of, passes_of

HIDDEN, MLP, VOCABULARY = 2048, 5632, 32000
SHAPES = {
    "q": (HIDDEN, HIDDEN),
    "k": (256, HIDDEN),
    "v": (256, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (MLP, HIDDEN),
    "up": (MLP, HIDDEN),
    "down": (HIDDEN, MLP),
}
BLOCK = sum(rows * columns for rows, columns in SHAPES.values())
CALIBRATION = CalibrationSpec(data="text.txt", samples=8, length=256)


def facts(layers):
    """The 1.1-billion Llama of benchmarks/memory.py."""
    parameters = layers * BLOCK + 2 * VOCABULARY * HIDDEN
    return ModelFacts(
        source="llama",
        model_type="llama",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        parameters=parameters,
        bytes=2 * parameters,
        largest_block_bytes=2 * BLOCK,
        outside_bytes=4 * VOCABULARY * HIDDEN,
        blocks=layers,
        linears=tuple(
            LinearFacts(name=f"{layer}.{name}", out_features=rows, in_features=columns)
            for layer in range(layers)
            for name, (rows, columns) in SHAPES.items()
        ),
        has_tokenizer=True,
        config={"vocab_size": VOCABULARY},
    )


def recipe(method, export="safetensors", **params):
    passes, exports = (Step(method, params),), (Step(export),)
    return Recipe(model=ModelSpec(id="m"), calibration=CALIBRATION, passes=passes, exports=exports)


def made(method, layers=4, calibration=CALIBRATION, max_memory=None, export="safetensors", **params):
    wanted = recipe(method, export, **params)
    return estimate(facts(layers), passes_of(wanted), exporters_of(wanted), calibration, max_memory)


@pytest.mark.parametrize(("method", "gib"), [("rtn", 0.69), ("gptq", 1.1)])
def test_within_a_fifth_of_what_was_measured_whatever_the_number_of_layers(method, gib):
    for layers in (4, 22):
        assert made(method, layers).peak_bytes / 2**30 == pytest.approx(gib, rel=0.2)
    assert made(method, 4).peak_bytes == made(method, 22).peak_bytes


def test_hidden_states_count_and_go_to_disk():
    many = msgspec.structs.replace(CALIBRATION, samples=2000)
    free, few = made("gptq", calibration=many), made("gptq")
    states = (2000 - 8) * 256 * HIDDEN * 2
    assert free.peak_bytes - few.peak_bytes == states
    assert free.limits.states_bytes is None
    limited = made("gptq", calibration=many, max_memory=1500 << 20)
    assert limited.peak_bytes <= 1500 << 20
    assert 0 < limited.limits.states_bytes < states


def test_a_correction_holds_hidden_states_and_the_weights_of_a_block_twice():
    many = msgspec.structs.replace(CALIBRATION, samples=2000)
    more = [made("gptq", correction=0.5, calibration=one).peak_bytes for one in (CALIBRATION, many)]
    plain = [made("gptq", calibration=one).peak_bytes for one in (CALIBRATION, many)]
    states = 8 * 256 * HIDDEN * 2
    assert more[0] - plain[0] == 2 * BLOCK + 4 * MLP**2 + states
    assert (more[1] - more[0]) == 2 * (plain[1] - plain[0])


def test_batches_become_smaller_before_a_limit_is_refused():
    narrow = msgspec.structs.replace(
        facts(4), linears=(LinearFacts(name="0.q", out_features=64, in_features=4096),), largest_block_bytes=1 << 19
    )
    passes, exporters = passes_of(recipe("gptq")), exporters_of(recipe("gptq"))
    free = estimate(msgspec.structs.replace(narrow, parameters=1 << 20), passes, exporters, CALIBRATION)
    tight = estimate(
        msgspec.structs.replace(narrow, parameters=1 << 20),
        passes,
        exporters,
        CALIBRATION,
        int((free.peak_bytes - (40 << 20)) / _MARGIN),
    )
    assert free.limits.batch_tokens == 2048
    assert tight.limits.batch_tokens == 1024


def test_hessians_of_experts_are_gathered_in_parts():
    experts = tuple(
        LinearFacts(name=f"0.experts.{expert}.w1", out_features=64, in_features=4096) for expert in range(64)
    )
    mixture = msgspec.structs.replace(facts(4), linears=experts, largest_block_bytes=1 << 19, parameters=1 << 20)
    passes, exporters = passes_of(recipe("gptq")), exporters_of(recipe("gptq"))
    free = estimate(mixture, passes, exporters, CALIBRATION)
    tight = estimate(mixture, passes, exporters, CALIBRATION, 2 << 30)
    assert free.limits.statistics_bytes == 4 << 30
    assert free.peak_bytes > 4 << 30
    assert tight.limits.statistics_bytes < 2 << 30
    assert tight.peak_bytes <= 2 << 30


def test_too_little_is_refused_with_what_is_needed():
    with pytest.raises(UsageError) as refused:
        made("gptq", max_memory=1 << 29)
    assert "at least 1." in refused.value.what
    assert "0.50 GiB are allowed" in refused.value.what
    assert "Hessian of 5632 inputs" in refused.value.where
    wanted = float(refused.value.hint.split()[2].removesuffix("GiB"))
    assert made("gptq", max_memory=int(wanted * 2**30)).peak_bytes <= wanted * 2**30


def test_an_exporter_that_holds_the_whole_model_is_told():
    with pytest.raises(UsageError) as refused:
        made("rtn", 22, max_memory=4 << 30, export="onnx")
    assert "export `onnx` holds the whole model" in refused.value.where
