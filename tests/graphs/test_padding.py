"""An encoder without padding gives what the padded one gives, whatever the mask, for every family."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from families import FAMILIES, Family, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.exporters.onnx_trace import trace
from llmopt.graphs.attention import spell_out
from llmopt.graphs.padding import Removal, remove_padding
from llmopt.graphs.token_index import Layout
from llmopt.passes.remove_padding import break_even

_ENCODER: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_BART = {"vocab_size": 272, "d_model": 64, "encoder_layers": 2, "decoder_layers": 1, "pad_token_id": 0}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
ENCODERS = {name: FAMILIES[name] for name in ("bert", "roberta", "distilbert", "t5")} | {
    "electra": Family(
        "ELECTRA", "ElectraForTokenClassification", {"model_type": "electra", **_ENCODER, "embedding_size": 32}
    ),
    "albert": Family("ALBERT", "AlbertModel", {"model_type": "albert", **_ENCODER, "embedding_size": 32}),
    "xlm-roberta": Family("XLM-RoBERTa", "XLMRobertaModel", {"model_type": "xlm-roberta", **_ENCODER}),
    "bart": Family(
        "BART",
        "BartForConditionalGeneration",
        {"model_type": "bart", **_BART, "max_position_embeddings": 64, "decoder_start_token_id": 2},
    ),
}


@cache
def opened(name: str) -> tuple[Any, Removal, list[onnxruntime.InferenceSession]]:
    """Return the model, what the pass did, and its graph without padding, as OpenVINO gets it and as ONNX Runtime."""
    torch.set_num_threads(1)
    model = make_model(ENCODERS[name])
    traced = trace(model, cache=False)
    sessions: list[onnxruntime.InferenceSession] = []
    for layout in (Layout(2, whole=True, short=5), Layout(3)):
        graph = traced.clone()
        report = remove_padding(graph, layout)
        spell_out(graph)
        path = Path(mkdtemp()) / "model.onnx"
        lookups = [node for node in graph.graph if node.op_type == "Gather" and node.inputs[0].is_initializer()]
        words = max(lookups, key=lambda node: node.inputs[0].shape[0]).outputs[0]
        words.name = "words"
        graph.graph.outputs.append(words)
        ir.save(graph, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        sessions.append(onnxruntime.InferenceSession(str(path), options))
    return model, report, sessions


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    batch, length = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["right", "left", "holes", "full", "empty"]))
    if kind == "full":
        return np.ones((batch, length), np.int64)
    if kind == "empty":
        return np.zeros((batch, length), np.int64)
    if kind == "holes":
        rows = st.lists(st.integers(0, 1), min_size=length, max_size=length)
        return np.array(draw(st.lists(rows, min_size=batch, max_size=batch)), np.int64)
    lengths = np.array(draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)))[:, None]
    places = np.arange(length)[None]
    return (places < lengths if kind == "right" else places >= length - lengths).astype(np.int64)


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(mask=masks(), seed=st.integers(0, 1 << 16))
def test_real_tokens_are_the_same(name: str, mask: np.ndarray, seed: int):
    model, report, sessions = opened(name)
    assert report.attentions == 2
    ids = np.random.default_rng(seed).integers(3, 270, mask.shape)
    feed = {"input_ids": np.where(mask, ids, model.config.pad_token_id or 0), "attention_mask": mask}
    names = {value.name for value in sessions[0].get_inputs()}
    if "token_type_ids" in names:
        feed["token_type_ids"] = ids % 2
    if "decoder_input_ids" in names:
        feed["decoder_input_ids"] = ids[:, :1].repeat(3, axis=1)
    with torch.no_grad():
        expected = model(**{key: torch.tensor(value) for key, value in feed.items()})
    for session in sessions:
        got = dict(zip((value.name for value in session.get_outputs()), session.run(None, feed), strict=True))
        compare(got, expected, mask, generates="decoder_input_ids" in feed)


def compare(made: dict[str, np.ndarray], expected: Any, mask: np.ndarray, *, generates: bool) -> None:
    compared = 0
    for name, got in made.items():
        if name not in expected:
            continue
        reference = expected[name].numpy()
        assert got.shape == reference.shape
        assert np.isfinite(got).all()
        kept = mask.any(axis=1)  # a text without tokens says nothing
        if got.ndim == 3 and (name.startswith("encoder") or not generates):
            kept = mask == 1
            assert (got[~kept] == 0).all()
        elif not generates:  # made from the first token
            kept = mask[:, 0] == 1
        if len(got) == len(mask):
            assert np.abs(got[kept] - reference[kept]).max(initial=0) < 1e-5
            compared += 1
    assert compared


@pytest.mark.parametrize(("lengths", "rows"), [((5, 1, 1), 9), ((2, 2, 2), 6), ((4,), 4), ((0, 0, 0), 3)])
def test_the_row_is_filled_up_to_a_multiple_of_the_batch(lengths: tuple[int, ...], rows: int):
    """An engine that compiles for each shape meets no more of them than texts have lengths."""
    filled, exact = opened("bert")[2]
    mask = (np.arange(6) < np.array(lengths)[:, None]).astype(np.int64)
    feed = {"input_ids": mask * 5, "attention_mask": mask, "token_type_ids": mask * 0}
    assert filled.run(["words"], feed)[0].shape[1] == rows
    assert exact.run(["words"], feed)[0].shape[1] == max(1, sum(lengths))


def test_what_is_moved_for_a_token_is_counted():
    """In each of two layers queries, keys and values are gathered, outputs put together and gathered back."""
    _, report, _ = opened("bert")
    width, layers = FAMILIES["bert"].config["hidden_size"], 2
    assert report.attentions == layers
    assert report.moved == layers * 2 * 4 * 5 * width


def test_wide_models_pay_for_packing_sooner():
    """A token of a BERT layer takes 24 * width ** 2 operations, and 40 * width bytes are moved for it."""
    narrow, wide = (break_even(24 * width**2, 40 * width) for width in (384, 768))
    assert 0.94 < narrow < 0.97 < wide < 1
    assert break_even(0, 40) == 0
