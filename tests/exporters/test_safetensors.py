"""Hugging Face checkpoints: shards written tensor by tensor, and layers packed as compressed-tensors reads them."""

import json
import struct

import pytest
import torch
from helpers import build, grid, open_model, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.exports import ExportContext
from llmopt.core.passes import PassContext
from llmopt.exporters.safetensors import Safetensors, SafetensorsParams
from llmopt.exporters.shards import ShardWriter, TensorSpec
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.sweep import run_sweep
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TENSORS = {
    "b.weight": torch.randn(3, 5),
    "a.weight": torch.randn(7).to(torch.bfloat16),
    "c.codes": torch.randint(0, 255, (3, 3), dtype=torch.uint8),
    "c.half": torch.randn(1, 3).half(),
    "d.shape": torch.tensor([3, 5]),
    "d.mask": torch.tensor([True, False, True]),
    "d.packed": torch.randint(-9, 9, (2, 2), dtype=torch.int32),
    "é": torch.randn(()),
    "none": torch.empty(0, 4),
    "wide": torch.randn(2, dtype=torch.float64),
    "e.eight": torch.randn(3).to(torch.float8_e4m3fn),
    "e.five": torch.randn(3).to(torch.float8_e5m2),
    "e.short": torch.ones(3, dtype=torch.int16),
    "e.byte": torch.ones(3, dtype=torch.int8),
}


def specs(tensors):
    return {name: TensorSpec(str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder, tensors, **options):
    with ShardWriter(folder, specs(tensors), **options) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length]), data[8 + length :]


class TestShards:
    def test_a_shard_is_what_the_library_writes(self, tmp_path):
        write(tmp_path, TENSORS)
        save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        ours, theirs = header_of(tmp_path / "model.safetensors"), header_of(tmp_path / "theirs.safetensors")
        assert ours[1] == theirs[1]
        assert ours[2] == theirs[2]
        assert ours[0] % 8 == theirs[0] % 8 == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "theirs.safetensors"]

    def test_the_library_reads_it(self, tmp_path):
        write(tmp_path, TENSORS)
        got = load_file(tmp_path / "model.safetensors")
        assert sorted(got) == sorted(TENSORS)
        assert all(got[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
        assert all(got[name].float().equal(tensor.float()) for name, tensor in TENSORS.items())

    def test_shards_and_their_index(self, tmp_path):
        tensors = {f"layer.{index}": torch.randn(10, 10) for index in range(10)} | {"big": torch.randn(40, 40)}
        write(tmp_path, tensors, max_shard_bytes=1000)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert files == [f"model-{number:05d}-of-00006.safetensors" for number in range(1, 7)]
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert sorted(index["weight_map"]) == sorted(tensors)
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / file, framework="pt") as shard:
                assert shard.get_tensor(name).equal(tensors[name])
        # A shard exceeds the limit only when a single tensor does.
        sizes = {
            file: sum(load_file(tmp_path / file)[key].nbytes for key in load_file(tmp_path / file)) for file in files
        }
        assert all(size <= 1000 or len(load_file(tmp_path / file)) == 1 for file, size in sizes.items())

    def test_a_view_is_written_as_its_copy(self, tmp_path):
        tensor = torch.randn(6, 4)
        write(tmp_path, {"a": tensor.T})
        assert load_file(tmp_path / "model.safetensors")["a"].equal(tensor.T)

    @pytest.mark.parametrize(
        ("name", "tensor", "error"),
        [
            ("a", torch.zeros(3), ValueError),
            ("a", torch.zeros(2, dtype=torch.float16), ValueError),
            ("b", torch.zeros(2), KeyError),
        ],
    )
    def test_what_was_not_announced_is_refused(self, tmp_path, name, tensor, error):
        with pytest.raises(error), ShardWriter(tmp_path, {"a": TensorSpec("torch.float32", (2,))}) as writer:
            writer.write(name, tensor)

    def test_what_never_came_is_a_defect(self, tmp_path):
        with (
            pytest.raises(ValueError, match="never written: b"),
            ShardWriter(tmp_path, {name: TensorSpec("torch.float32", (2,)) for name in "ab"}) as writer,
        ):
            writer.write("a", torch.zeros(2))

    def test_nothing_is_written_twice(self, tmp_path):
        with ShardWriter(tmp_path, {"a": TensorSpec("torch.float32", (2,))}) as writer:
            writer.write("a", torch.zeros(2))
            with pytest.raises(KeyError):
                writer.write("a", torch.zeros(2))


def quantized_model(family, work, name="llama", dtype="float32", **params):
    model = open_model(family(name, dtype=dtype), work)
    run_sweep(model, [Rtn(RtnParams(**({"group_size": 32} | params)))], [], PassContext())
    return model


def exported(model, directory, **params):
    directory.mkdir()
    exporter = Safetensors(SafetensorsParams(**params))
    exporter.export(model, directory, ExportContext())
    return exporter


class TestPacked:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize(
        "params",
        [
            {"bits": 2},
            {"bits": 3, "symmetric": False},
            {"bits": 4, "group_size": "channel"},
            {"bits": 5, "group_size": "tensor"},
            {"bits": 6, "group_size": "channel", "symmetric": False},
            {"bits": 8, "group_size": 16},
        ],
        ids=str,
    )
    def test_layers_are_read_back_bit_for_bit(self, params, dtype, family, tmp_path):
        model = quantized_model(family, tmp_path / "work", dtype=dtype, **params)
        exporter = exported(model, tmp_path / "out")
        assert exporter.weights_equal(model, tmp_path / "out") is True

    def test_a_changed_code_is_noticed(self, family, tmp_path):
        model = quantized_model(family, tmp_path / "work")
        exporter = exported(model, tmp_path / "out")
        path = tmp_path / "out" / "model.safetensors"
        for key in ("weight_packed", "weight_scale"):
            tensors = load_file(path)
            tensors[f"model.layers.1.mlp.up_proj.{key}"][0, 0] += 1
            save_file(tensors, path, metadata={"format": "pt"})
            assert exporter.weights_equal(model, tmp_path / "out") is False
            exported(model, tmp_path / f"again-{key}")
            path.write_bytes((tmp_path / f"again-{key}" / "model.safetensors").read_bytes())

    def test_a_missing_layer_is_noticed(self, family, tmp_path):
        model = quantized_model(family, tmp_path / "work")
        exporter = exported(model, tmp_path / "out")
        path = tmp_path / "out" / "model.safetensors"
        tensors = {key: value for key, value in load_file(path).items() if "layers.1.mlp.up_proj" not in key}
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(LlmoptError, match=r"`model.layers.1.mlp.up_proj.weight_packed` is missing"):
            exporter.weights_equal(model, tmp_path / "out")

    def test_parts_of_a_layer_in_different_shards(self, family, tmp_path):
        model = quantized_model(family, tmp_path / "work", symmetric=False)
        exporter = exported(model, tmp_path / "out", max_shard_gb=2e-6)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 20
        assert exporter.weights_equal(model, tmp_path / "out") is True

    def test_the_config_says_what_readers_need(self, family, tmp_path):
        model = quantized_model(family, tmp_path / "work", symmetric=False, ignore=("*.down_proj",))
        exported(model, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config == {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": False,
                        "strategy": "group",
                        "group_size": 32,
                    },
                }
            },
            "ignore": ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
            "dequantize": True,  # transformers makes too much room for packed zero points unless it is told this
        }

    @pytest.mark.parametrize(
        ("name", "symmetric", "said"), [("llama", True, False), ("llama", False, True), ("t5", True, True)]
    )
    def test_transformers_is_told_to_multiply_out_only_where_it_must(self, name, symmetric, said, family, tmp_path):
        model = quantized_model(family, tmp_path / "work", name=name, symmetric=symmetric)
        exported(model, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert ("dequantize" in config) == said

    def test_plain_holds_the_rounded_weights(self, family, tmp_path):
        model = quantized_model(family, tmp_path / "work", name="gpt2")
        exporter = exported(model, tmp_path / "out", format="plain")
        assert exporter.weights_equal(model, tmp_path / "out") is None
        got = load_file(tmp_path / "out" / "model.safetensors")
        assert sorted(got) == sorted(model.checkpoint.tensors)
        assert all(got[name].equal(model.read(name)) for name in got)
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())

    def test_same_bytes_twice(self, family, tmp_path):
        for name in ("first", "second"):
            exported(quantized_model(family, tmp_path / f"work-{name}"), tmp_path / name)
        files = sorted(path.name for path in (tmp_path / "first").iterdir())
        assert "model.safetensors" in files
        assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "second" / f).read_bytes() for f in files)


class TestRefusals:
    def refused(self, family, name, made_grid, **params):
        facts = open_model(family(name), family(name).parent / "unused").facts
        with pytest.raises(UsageError) as caught:
            Safetensors(SafetensorsParams(**params)).check(facts, made_grid)
        assert caught.value.hint
        assert caught.value.exit_code == 2
        return caught.value

    def test_packing_what_is_not_quantized(self, family):
        error = self.refused(family, "llama", None, format="compressed-tensors")
        assert error.what == "nothing to pack: no pass quantizes the weights"

    def test_conv1d(self, family):
        assert "Conv1D" in (self.refused(family, "gpt2", grid()).where or "")

    def test_an_asymmetric_tensor(self, family):
        error = self.refused(family, "llama", grid(4, "tensor", symmetric=False))
        assert "--group-size channel" in (error.hint or "")

    def test_asymmetric_experts(self, family):
        assert "experts" in self.refused(family, "mixtral", grid(symmetric=False)).what

    def test_what_can_be_held_passes(self, family):
        for name in ("llama", "mixtral", "bert", "whisper", "vit", "t5"):
            facts = open_model(family(name), family(name).parent / "unused").facts
            Safetensors(SafetensorsParams()).check(facts, grid())
            Safetensors(SafetensorsParams()).check(facts, None)
        gpt2 = open_model(family("gpt2"), family("gpt2").parent / "unused").facts
        Safetensors(SafetensorsParams(format="plain")).check(gpt2, grid())


def test_a_layer_without_a_name_of_its_own_cannot_be_packed(family, tmp_path):
    model = quantized_model(family, tmp_path / "work")
    name = "model.layers.0.mlp.up_proj"
    path, grid_of = model.store._files.pop(name), model.store.grids.pop(name)
    model.store._files[f"{name}.0"], model.store.grids[f"{name}.0"] = path, grid_of
    with pytest.raises(LlmoptError) as caught:
        exported(model, tmp_path / "out")
    assert "3-D tensor" in (caught.value.where or "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_model_is_verified(dtype, family, tmp_path):
    manifest = build(recipe(family("llama", dtype=dtype), ("rtn", {"group_size": 32})), tmp_path / "out")
    assert manifest.exports[0].verification.weights_equal is True


def test_a_cast_is_verified(family, tmp_path):
    build(recipe(family("llama"), ("cast", {"dtype": "bfloat16"})), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
