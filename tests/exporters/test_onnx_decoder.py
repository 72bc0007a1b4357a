"""A cached decoder after `fuse`: every layer a GroupQueryAttention, and transformers' numbers whatever is asked."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from families import FAMILIES, make_model, random_rows
from llmopt.core.graph import SHARED_CACHE, GraphModel
from llmopt.core.passes import PassContext, PassResult
from llmopt.core.quantized import Grid
from llmopt.exporters.onnx import Onnx, OnnxParams
from llmopt.graphs import rotary
from llmopt.passes.fuse import Fuse
from llmopt.runtimes.onnxruntime_ import OnnxRuntime
from standin import StandIn, quantized_standin

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ("llama", "gemma2")
DECODERS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, family in FAMILIES.items()
    if family.is_decoder
]
UNROTATED = ("gpt2", "opt")
TOLERANCE = 1e-4


@dataclass
class Exported:
    """A model, its graph, and the cache that both have."""

    model: Any
    folder: Path
    graph: ir.Model
    result: PassResult

    def __post_init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(self.folder / "model.onnx", options)
        self.names = {value.name: value for value in self.session.get_inputs()}
        self.fresh()

    def fresh(self) -> None:
        self.kept: Any = None
        self.past: dict[str, Any] = {}

    def nodes(self, operator: str) -> list[ir.Node]:
        return [node for node in self.graph.graph.all_nodes() if node.op_type == operator]

    def feed(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(ids, mask)}
        return {name: value.numpy() for name, value in given.items() if name in self.names}

    def difference(self, ids: torch.Tensor, mask: torch.Tensor) -> float:
        """Run both on new tokens behind the cache, and return how far the logits of real tokens are apart."""
        feed = self.feed(ids, mask)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(ids, mask)}
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            del given["position_ids"]
        with torch.no_grad():
            expected = self.model(**given, past_key_values=self.kept, use_cache=True)
        empty = {
            name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
            for name, value in self.names.items()
            if name.startswith("past_key_values.")
        }
        names = [value.name for value in self.session.get_outputs()]
        made = dict(zip(names, self.session.run(names, {**empty, **self.past, **feed}), strict=True))
        self.kept = expected.past_key_values
        self.past = {name.replace("present", "past_key_values"): made[name] for name in names if "present" in name}
        real = mask[:, -ids.shape[1] :].bool().numpy()
        return float(np.abs(made["logits"] - expected.logits.numpy())[real].max())


def positions_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]


def export(model: Any, folder: Path, *, padding: Any = "any", **params: Any) -> Exported:
    source, exporter = StandIn(model), Onnx(OnnxParams(**params))
    graph = exporter.trace(source)
    result = Fuse(Fuse.Params(padding=padding)).run(GraphModel(graph, source.facts, "onnxruntime"), PassContext())
    exporter.save(graph, source, folder)
    return Exported(model, folder, graph, result)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            made[name] = export(make_model(FAMILIES[name]), tmp_path_factory.mktemp(name))
        made[name].fresh()
        return made[name]

    return get


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(random_rows(rows, length, seed))


@pytest.mark.parametrize("name", DECODERS)
def test_every_layer_is_one_node(name: str, exported: Any):
    made = exported(name)
    layers = made.model.config.num_hidden_layers
    assert len(made.nodes("GroupQueryAttention")) == layers
    assert len(made.nodes("RotaryEmbedding")) == (0 if name in UNROTATED else 2 * layers)
    assert not made.nodes("Cos")
    metrics = made.result.metrics
    assert metrics["attention_count"] == metrics["group_query_attention_count"] == layers
    assert metrics["nodes_after_count"] < metrics["nodes_before_count"]
    assert not [skip for skip in made.result.skipped if "attention" in skip.name or "rotary" in skip.name]


@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_padded_on_the_left_and_what_follows_it(name: str, exported: Any):
    made = exported(name)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :7] = 0  # of the first row: the kernel would take its first position for all
    assert made.difference(tokens(2, 20), mask) < TOLERANCE
    for step in range(4):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        assert made.difference(tokens(2, 1, step), mask) < TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
def test_one_text_goes_on_by_several_tokens_and_by_one(name: str, exported: Any):
    made = exported(name)
    total = 0
    for step, length in enumerate((13, 5, 1, 1, 3)):
        total += length
        assert made.difference(tokens(1, length, step), torch.ones(1, total, dtype=torch.int64)) < TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_the_same(name: str, exported: Any):
    made = exported(name)
    ids = tokens(1, 10)
    expected = made.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert OnnxRuntime().open(made.folder, threads=1).generate(ids[0].tolist(), 12) == expected[0, 10:].tolist()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "name", ["qwen2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen3", "gpt_neox"))]
)
def test_padding_on_one_side_only(name: str, padding: str, tmp_path: Path):
    made = export(make_model(FAMILIES[name], num_hidden_layers=1), tmp_path, padding=padding)
    inside = name != "gpt_neox"  # which turns a part of each head
    assert bool(made.nodes("RotaryEmbedding")) != inside
    assert ("position_ids" in made.names) != inside
    assert made.result.metrics["rotary_count"] == 2
    if name == "qwen2":
        assert len(made.nodes("MatMul")) == 5  # one for queries, keys and values
    assert bool(made.nodes("Where")) == (padding == "left")  # the mask of the padding
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, slice(5) if padding == "left" else slice(7, None)] = 0
    assert made.difference(tokens(2, 12), mask) < TOLERANCE
    for step in range(3):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        assert made.difference(tokens(2, 1, step), mask) < TOLERANCE
    made.fresh()
    for step, (length, total) in enumerate(((9, 9), (4, 13), (1, 14))):
        assert made.difference(tokens(1, length, step), torch.ones(1, total, dtype=torch.int64)) < TOLERANCE


def test_past_and_present_may_be_the_same_memory(exported: Any):
    made = exported("gemma2")
    session, length = made.session, 48
    names = [name for name in made.names if name.startswith("past_key_values.")]
    # Rubbish behind what the buffer holds must not matter.
    buffers = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.full((2, made.names[name].shape[1], length, made.names[name].shape[3]), 9, np.float32)
        )
        for name in names
    }
    mask = torch.ones(2, 0, dtype=torch.int64)
    for step, fresh in enumerate((14, 1, 1, 1)):
        ids, new = tokens(2, fresh, step), torch.ones(2, fresh, dtype=torch.int64)
        if not step:
            new[1, :5] = 0
        mask = torch.cat([mask, new], 1)
        binding = session.io_binding()
        for name, value in made.feed(ids, mask).items():
            binding.bind_cpu_input(name, value)
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound.
        logits = binding.get_outputs()[-1].numpy()
        assert made.difference(ids, mask) < TOLERANCE
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            whole = torch.cat([tokens(2, count, place) for place, count in enumerate((14, 1, 1, 1)[: step + 1])], 1)
            expected = made.model(input_ids=whole, attention_mask=mask, position_ids=positions).logits[:, -fresh:]
        assert np.abs(logits - expected.numpy())[new.bool().numpy()].max() < TOLERANCE


def test_generating_keeps_the_cache_where_it_is(exported: Any, monkeypatch: pytest.MonkeyPatch):
    made = exported("gemma2")
    session = OnnxRuntime().open(made.folder, threads=1)
    places: set[tuple[int, ...]] = set()
    bound = session._bound

    def watched(feed: Any, kept: Any) -> Any:
        assert kept
        places.add(tuple(each.data_ptr() for each in kept.values()))
        return bound(feed, kept)

    monkeypatch.setattr(session, "_bound", watched)
    assert len(session.generate([5, 6, 7, 8, 9], 20)) == 20
    assert len(places) == 1


def test_a_graph_without_the_kernel_shares_no_cache(tmp_path: Path):
    made = export(make_model(FAMILIES["llama"], head_dim=12, num_hidden_layers=1), tmp_path)
    assert SHARED_CACHE not in made.session.get_modelmeta().custom_metadata_map
    session = OnnxRuntime().open(made.folder, threads=1)
    ids = [5, 6, 7, 8, 9]
    expected = made.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert session.generate(ids, 8) == expected[0, 5:].tolist()


def test_a_batch_of_several_tokens_behind_a_past_is_refused_by_the_engine(exported: Any):
    made = exported("llama")
    made.difference(tokens(2, 5), torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(Exception, match="batch_size must be 1"):
        made.difference(tokens(2, 3), torch.ones(2, 8, dtype=torch.int64))


def test_heads_that_the_kernel_does_not_take_are_told(tmp_path: Path):
    made = export(make_model(FAMILIES["llama"], head_dim=12, num_hidden_layers=1), tmp_path)
    assert not made.nodes("GroupQueryAttention")
    reason = "its head size of 12 is not a multiple of 8"
    assert ("attention 0", reason) in [tuple(skip) for skip in made.result.skipped]
    assert made.difference(tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)) < TOLERANCE


def test_tables_that_are_too_large_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rotary, "LARGEST_TABLES", 1 << 10)
    made = export(make_model(FAMILIES["llama"], num_hidden_layers=1), tmp_path)
    assert len(made.nodes("GroupQueryAttention")) == 1
    assert made.nodes("Cos")
    assert any(skip.name == "rotary embedding 0" and "would take" in skip.reason for skip in made.result.skipped)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    assert made.difference(tokens(2, 9), mask) < TOLERANCE


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda each: each["rope_type"],
)
def test_scaled_rotary_embeddings(parameters: dict[str, Any], tmp_path: Path):
    model = make_model(FAMILIES["llama"], num_hidden_layers=1, rope_parameters=parameters)
    made = export(model, tmp_path)
    assert len(made.nodes("RotaryEmbedding")) == 2
    assert made.difference(tokens(1, 60), torch.ones(1, 60, dtype=torch.int64)) < TOLERANCE


def test_logits_of_the_last_token_alone(tmp_path: Path):
    made = export(make_model(FAMILIES["gemma2"]), tmp_path, last_logits=True)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    given = made.feed(ids, mask)
    with torch.no_grad():
        expected = made.model(**{name: torch.from_numpy(value) for name, value in given.items()}).logits.numpy()
    session = OnnxRuntime().open(tmp_path, threads=1)
    assert session._run(given)["logits"].shape == (2, 1, expected.shape[-1])
    scored = session.outputs({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["logits"]
    assert np.abs(scored - expected)[mask.bool().numpy()].max() < TOLERANCE


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("phi3", "mixtral"))]
)
def test_codes_are_found_in_the_fused_graph(name: str, tmp_path: Path):
    source = quantized_standin(
        make_model(FAMILIES[name], num_hidden_layers=1), Grid(bits=4, group_size=32, symmetric=True)
    )
    exporter = Onnx(OnnxParams(activations="float32"))
    graph = exporter.trace(source)
    result = Fuse(Fuse.Params()).run(GraphModel(graph, source.facts, "onnxruntime"), PassContext())
    exporter.carry_codes(graph, source)
    exporter.save(graph, source, tmp_path)
    assert exporter.weights_equal(source, tmp_path)
    made = Exported(source.model, tmp_path, graph, result)
    assert len(made.nodes("GroupQueryAttention")) == 1
    assert len(made.nodes("MatMulNBits")) == len(source.quantized)
    assert made.difference(tokens(1, 9), torch.ones(1, 9, dtype=torch.int64)) < TOLERANCE
