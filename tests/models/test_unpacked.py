"""Reading an artifact's weights back as its readers do, a few rows at a time."""

import pytest
from helpers import open_model
from llmopt.core.exports import ExportContext
from llmopt.core.passes import PassContext
from llmopt.exporters.safetensors import Safetensors, SafetensorsParams
from llmopt.models import unpacked
from llmopt.models.unpacked import UnpackedFolder, same_weights
from llmopt.passes.quantize_activations import QuantizeActivations, QuantizeActivationsParams
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.sweep import run_sweep

GRIDS = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "symmetric": False},
    {"bits": 3, "group_size": 32, "symmetric": False},
    {"bits": 8, "group_size": "channel"},
    {"bits": 8, "group_size": "tensor"},
    {"number": "fp8"},
    {"number": "nvfp4"},
    {"number": "mxfp4"},
]


def exported(folder, tmp_path, *, written="auto", **params):
    model = open_model(folder, tmp_path / "work")
    run_sweep(model, [Rtn(RtnParams(**params))], [], PassContext())
    directory = tmp_path / "artifact"
    directory.mkdir()
    Safetensors(SafetensorsParams(format=written)).export(model, directory, ExportContext())
    return model, directory


@pytest.mark.parametrize("params", GRIDS, ids=str)
@pytest.mark.parametrize("written", ["auto", "plain"])
def test_every_weight_comes_back(params, written, family, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked, "IN_CACHE", 1)  # several parts, however small the layer is
    dtype = "bfloat16" if params.get("number") in ("nvfp4", "mxfp4") else "float32"
    model, directory = exported(family("llama", dtype=dtype), tmp_path, written=written, **params)
    folder = UnpackedFolder(directory)
    for name in model.checkpoint.tensors:
        assert folder.read(name).equal(model.read(name)), name
    assert same_weights(model, directory)


def test_weights_beside_int8_inputs_come_back(family, tmp_path):
    model = open_model(family("llama"), tmp_path / "work")
    passes = [Rtn(RtnParams(group_size=32)), QuantizeActivations(QuantizeActivationsParams())]
    run_sweep(model, passes, [], PassContext())
    (tmp_path / "artifact").mkdir()
    Safetensors(SafetensorsParams()).export(model, tmp_path / "artifact", ExportContext())
    assert same_weights(model, tmp_path / "artifact")


@pytest.mark.parametrize("written", ["auto", "plain"])
def test_one_wrong_byte_is_found(written, family, tmp_path):
    model, directory = exported(family("llama"), tmp_path, written=written, bits=4, group_size=32)
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 0x10
    path.write_bytes(data)
    assert not same_weights(model, directory)
