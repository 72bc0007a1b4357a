"""The layouts of packed codes, read back and read by others.

The readers of GPTQ and AWQ here follow the formats' descriptions field by field, in Python integers, and share no code
with the packer.
"""

import json

import pytest
import torch
from helpers import build, grid, open_model, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.exports import ExportContext
from llmopt.core.passes import PassContext
from llmopt.core.progress import Silent
from llmopt.core.quantized import BITS, Grid, QuantizedWeight
from llmopt.exporters.layouts import LAYOUTS
from llmopt.exporters.safetensors import Safetensors, SafetensorsParams
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.artifact import open_artifact
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.sweep import run_sweep
from llmopt.pipeline.verify import verify
from llmopt.runtimes.packed import dequantized
from safetensors.torch import load_file, save_file

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = {"compressed-tensors": BITS, "gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "awq": (4,)}


@st.composite
def quantized(draw, name):
    """Return a random weight of a shape that fills the layout's words; compressed-tensors takes any."""
    bits = draw(st.sampled_from(WIDTHS[name]))
    unit = {"compressed-tensors": 1, "awq": 8}.get(name, 32 if bits == 3 else 32 // bits)
    rows = draw(st.integers(1, 40 if unit == 1 else 5)) * unit
    columns = draw(st.integers(1, 70 if unit == 1 else 5)) * (1 if name == "awq" else unit)
    sizes = [size for size in range(1, columns + 1) if columns % size == 0]
    size = draw(st.sampled_from([*sizes, "channel", *(["tensor"] if name == "compressed-tensors" else [])]))
    symmetric = name == "gptq" or size == "tensor" or draw(st.booleans())
    made = Grid(bits=bits, group_size=size, symmetric=symmetric)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (1, 1) if size == "tensor" else (rows, columns // made.group_width(columns))
    scale = torch.rand(shape, generator=generator).add(0.01).to(draw(st.sampled_from(DTYPES)))
    codes = torch.randint(0, made.levels, (rows, columns), generator=generator).to(torch.uint8)
    zero = None if symmetric else torch.randint(0, made.levels, shape, generator=generator).to(torch.uint8)
    return QuantizedWeight(codes=codes, scale=scale, zero_point=zero, grid=made)


def same(first, second):
    zeros = (first.zero_point, second.zero_point)
    return (
        first.grid == second.grid
        and first.codes.equal(second.codes)
        and first.scale.equal(second.scale)
        and first.scale.dtype == second.scale.dtype
        and (zeros == (None, None) or zeros[0].equal(zeros[1]))
    )


@pytest.mark.parametrize("name", LAYOUTS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_codes_come_back(name, data):
    weight = data.draw(quantized(name))
    layout = LAYOUTS.load(name)()
    parts = layout.pack(weight)
    specs = layout.specs(weight.shape, str(weight.scale.dtype).removeprefix("torch."), weight.grid)
    assert {part: (str(tensor.dtype), tuple(tensor.shape)) for part, tensor in parts.items()} == {
        part: (spec.dtype, spec.shape) for part, spec in specs.items()
    }
    assert all(tensor.is_contiguous() for tensor in parts.values())
    assert same(layout.unpack(parts, weight.grid, str(weight.scale.dtype).removeprefix("torch.")), weight)


def field(words, index, bits):
    """Return the field at `index` of a stream of bits that begins with the lowest bit of the first word."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return stream >> (bits * index) & ((1 << bits) - 1)


def read_gptq(parts, bits, *, added):
    """Return the weight (out, in) of a GPTQ layer; `added` is 1 for version 1 and 0 for version 2."""
    columns, rows = len(parts["g_idx"]), parts["scales"].shape[1]
    assert parts["qweight"].shape[0] * 32 == columns * bits
    codes, zeros, scales = (torch.empty(rows, columns) for _ in range(3))
    for row in range(rows):
        for column in range(columns):
            group = int(parts["g_idx"][column])
            codes[row, column] = field(parts["qweight"][:, row], column, bits)
            zeros[row, column] = (field(parts["qzeros"][group], row, bits) + added) % (1 << bits)
            scales[row, column] = float(parts["scales"][group, row])
    return ((codes - zeros) * scales).to(parts["scales"].dtype)


def read_awq(parts):
    """Return the weight (out, in) of an AWQ GEMM layer."""
    columns, (groups, rows) = len(parts["qweight"]), parts["scales"].shape
    place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}  # which four bits of a word hold which column of eight
    codes, zeros, scales = (torch.empty(rows, columns) for _ in range(3))
    for row in range(rows):
        word, nibble = row // 8, place[row % 8]
        for column in range(columns):
            group = column // (columns // groups)
            codes[row, column] = int(parts["qweight"][column, word]) >> (4 * nibble) & 15
            zeros[row, column] = int(parts["qzeros"][group, word]) >> (4 * nibble) & 15
            scales[row, column] = float(parts["scales"][group, row])
    return ((codes - zeros) * scales).to(parts["scales"].dtype)


def own_reader(parts, name, bits, folder):
    """Read a layer with the runtime that verifies such artifacts."""
    method = {"quant_method": name.removesuffix("_v2"), "checkpoint_format": name, "bits": bits}
    (folder / "config.json").write_text(json.dumps({"quantization_config": method}))
    save_file({f"layer.{part}": tensor for part, tensor in parts.items()}, folder / "model.safetensors")
    return dequantized(folder)["layer.weight"]


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_an_independent_reader_gets_our_weight_bit_for_bit(name, data, tmp_path_factory):
    weight = data.draw(quantized(name))
    parts = LAYOUTS.load(name)().pack(weight)
    got = read_awq(parts) if name == "awq" else read_gptq(parts, weight.bits, added=int(name == "gptq"))
    assert got.equal(weight.dequantize())
    assert own_reader(parts, name, weight.bits, tmp_path_factory.mktemp("own")).equal(weight.dequantize())


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_compressed_tensors_gets_our_weight_bit_for_bit(data):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmopt.exporters.layouts.compressed_tensors import weights_args

    weight = data.draw(quantized("compressed-tensors"))
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights_args(weight.grid)))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    got = compressor.decompress(LAYOUTS.load("compressed-tensors")().pack(weight), scheme)["weight"]
    assert got.dtype == weight.scale.dtype
    assert got.equal(weight.dequantize())


def test_our_reader_follows_the_groups_of_reordered_inputs(tmp_path):
    weight = QuantizedWeight(
        torch.randint(0, 16, (8, 16), dtype=torch.uint8),
        torch.rand(8, 4),
        torch.randint(0, 16, (8, 4), dtype=torch.uint8),
        Grid(bits=4, group_size=4, symmetric=False),
    )
    parts = LAYOUTS.load("gptq_v2")().pack(weight)
    parts["g_idx"] = parts["g_idx"][torch.randperm(16)].contiguous()
    assert own_reader(parts, "gptq_v2", 4, tmp_path).equal(read_gptq(parts, 4, added=0))
    with pytest.raises(LlmoptError, match="do not fit together"):
        own_reader({**parts, "g_idx": parts["g_idx"] + 4}, "gptq_v2", 4, tmp_path)
    del parts["scales"]
    with pytest.raises(LlmoptError, match="do not fit together"):
        own_reader(parts, "gptq_v2", 4, tmp_path)


class TestWords:
    """Words written out by hand."""

    def test_gptq_stores_a_zero_point_less_one(self):
        codes = torch.arange(8, dtype=torch.uint8).repeat(8, 1)
        weight = QuantizedWeight(codes, torch.ones(8, 1), None, Grid(bits=4, group_size="channel", symmetric=True))
        for name, word in (("gptq", 0x77777777), ("gptq_v2", -0x77777778)):
            parts = LAYOUTS.load(name)().pack(weight)
            assert parts["qweight"].tolist() == [[0x76543210] * 8]
            assert parts["qzeros"].tolist() == [[word]]
            assert parts["g_idx"].tolist() == [0] * 8

    def test_awq_takes_even_columns_first_and_writes_the_midpoint(self):
        codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
        weight = QuantizedWeight(codes, torch.ones(8, 1), None, Grid(bits=4, group_size="channel", symmetric=True))
        parts = LAYOUTS.load("awq")().pack(weight)
        assert parts["qweight"].tolist() == [[0x75316420]]
        assert parts["qzeros"].tolist() == [[-0x77777778]]

    def test_three_bits_cross_the_words(self):
        codes = (torch.arange(32) % 8).to(torch.uint8).repeat(32, 1)
        weight = QuantizedWeight(codes, torch.ones(32, 1), None, Grid(bits=3, group_size="channel", symmetric=True))
        words = LAYOUTS.load("gptq")().pack(weight)["qweight"][:, 0]
        assert len(words) == 3
        assert sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words)) == sum(
            (index % 8) << (3 * index) for index in range(32)
        )

    @pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
    def test_a_symmetric_weight_whose_zero_points_moved_is_not_taken_for_one(self, name):
        weight = QuantizedWeight(
            torch.zeros(32, 32, dtype=torch.uint8),
            torch.ones(32, 1),
            None,
            Grid(bits=4, group_size="channel", symmetric=True),
        )
        layout = LAYOUTS.load(name)()
        parts = layout.pack(weight)
        parts["qzeros"][0, 0] += 1
        read = layout.unpack(parts, weight.grid, str(weight.scale.dtype).removeprefix("torch."))
        assert read.grid.symmetric is False
        assert int(read.zero_point[0, 0]) == 9


def exported(family, tmp_path, format_, name="llama", dtype="float16", **params):
    model = open_model(family(name, dtype=dtype), tmp_path / "work")
    run_sweep(model, [Rtn(RtnParams(**({"group_size": 32} | params)))], [], PassContext())
    exporter = Safetensors(SafetensorsParams(format=format_))
    (tmp_path / "out").mkdir()
    return model, exporter, exporter.export(model, tmp_path / "out", ExportContext())


FORMATS = [
    ("gptq", {"bits": 4}),
    ("gptq", {"bits": 3}),
    ("gptq", {"bits": 2, "group_size": 16}),
    ("gptq_v2", {"bits": 8, "symmetric": False}),
    ("gptq_v2", {"bits": 4, "group_size": "channel"}),
    ("awq", {"bits": 4}),
    ("awq", {"bits": 4, "symmetric": False}),
]


def onnx_codes(packed, bits):
    """Unpack the bytes of MatMulNBits, the lowest bits first."""
    return torch.stack([packed >> (bits * place) & ((1 << bits) - 1) for place in range(8 // bits)], -1).flatten(1)


class TestArtifacts:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize(("format_", "params"), FORMATS, ids=str)
    def test_built_and_verified_again(self, format_, params, dtype, family, tmp_path):
        made = recipe(
            family("llama", dtype=dtype),
            ("rtn", {"group_size": 32} | params),
            export=("safetensors", {"format": format_}),
        )
        record = build(made, tmp_path / "out").exports[0]
        assert record.verification.weights_equal is True
        assert record.verification.max_difference < 1e-5
        assert "llmopt's reader of packed codes" in record.verification.runtime
        assert "not by an engine" in record.notes[0]
        assert any("bfloat16" in note for note in record.notes) == (dtype == "bfloat16")
        assert verify(tmp_path / "out", reporter=Silent())[0].verification.passed
        assert open_artifact(str(tmp_path / "out")).runtime().name == "packed-codes"

    @pytest.mark.parametrize("format_", ["gptq", "awq"])
    @pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
    def test_a_changed_part_is_noticed(self, format_, part, family, tmp_path):
        model, exporter, _ = exported(family, tmp_path, format_)
        assert exporter.weights_equal(model, tmp_path / "out") is True
        path = tmp_path / "out" / "model.safetensors"
        tensors = load_file(path)
        tensors[f"model.layers.1.mlp.up_proj.{part}"][0, 0] += 1
        save_file(tensors, path, metadata={"format": "pt"})
        assert exporter.weights_equal(model, tmp_path / "out") is False

    def test_what_config_json_says_of_gptq(self, family, tmp_path):
        exported(family, tmp_path, "gptq_v2", group_size="channel", symmetric=False)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config == {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "bits": 4,
            "group_size": -1,
            "desc_act": False,
            "sym": False,
            "lm_head": False,
            "pack_dtype": "int32",
        }

    def test_gptq_names_its_layers_where_one_is_left_out(self, family, tmp_path):
        exported(family, tmp_path, "gptq", ignore=("*.down_proj",))
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        (names,) = config["modules_in_block_to_quantize"]
        assert "model.layers.0.mlp.up_proj" in names
        assert not any("down_proj" in name for name in names)

    def test_what_config_json_says_of_awq(self, family, tmp_path):
        exported(family, tmp_path, "awq", ignore=("*.0.mlp.down_proj",))
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config == {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj"],
        }

    @pytest.mark.parametrize("format_", ["gptq", "gptq_v2", "awq"])
    def test_transformers_reads_the_config(self, format_, family, tmp_path):
        from transformers.quantizers.auto import AutoQuantizationConfig

        exported(family, tmp_path, format_, ignore=("*.down_proj",))
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        read = AutoQuantizationConfig.from_dict(config)
        assert (read.bits, read.group_size) == (4, 32)
        assert read.format == ("gemm" if format_ == "awq" else format_)

    @pytest.mark.parametrize(
        ("format_", "params"),
        [
            ("gptq", {"bits": 4}),
            ("gptq", {"bits": 8, "group_size": 16}),
            ("gptq", {"bits": 2, "group_size": "channel"}),
            ("awq", {"bits": 4}),
            ("awq", {"bits": 4, "symmetric": False}),
        ],
        ids=str,
    )
    def test_the_reader_of_onnxruntime_genai_gets_our_codes(self, format_, params, family, tmp_path):
        from onnxruntime_genai.models.loaders.awq import AWQModel
        from onnxruntime_genai.models.loaders.gptq import GPTQModel

        model, _, _ = exported(family, tmp_path, format_, **params)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        reader = AWQModel if format_ == "awq" else GPTQModel
        read = reader(format_, str(tmp_path / "out"), {"config": config, "use_g_idx": False}, 64, 32, 96, 2)
        for name in model.quantized:
            weight, part = model.quantized_weight(name), read.layers[int(name.split(".")[2])]
            for step in name.split(".")[3:]:
                part = getattr(part, step)
            rows, groups = weight.scale.shape
            assert onnx_codes(part.qweight.reshape(rows, -1), weight.bits)[:, : weight.shape[1]].equal(weight.codes)
            assert part.scales.reshape(rows, groups).equal(weight.scale)
            zeros = onnx_codes(part.qzeros.reshape(rows, -1), weight.bits)[:, :groups]
            assert zeros.equal(
                torch.full_like(zeros, 1 << weight.bits - 1) if weight.zero_point is None else weight.zero_point
            )

    def test_engines_that_do_not_read_it_are_named(self, family, tmp_path):
        _, _, result = exported(family, tmp_path, "gptq_v2", bits=3)
        assert any("vLLM" in note and "int3" in note for note in result.notes)
        assert any("ONNX Runtime GenAI" in note for note in result.notes)

    def test_layers_on_several_grids_have_no_words(self, family, tmp_path):
        model, _, _ = exported(family, tmp_path, "plain")
        model.store.grids["model.layers.0.mlp.up_proj"] = grid(3, 32)
        for name in ("gptq", "gptq_v2", "awq"):
            with pytest.raises(LlmoptError, match="several grids") as caught:
                LAYOUTS.load(name)().config(model)
            assert "compressed-tensors" in caught.value.hint


class TestRefusals:
    def refused(self, family, format_, made_grid, name="llama", dtype="float16", **changes):
        facts = open_model(family(name, dtype=dtype, **changes), family(name).parent / "unused").facts
        with pytest.raises(UsageError) as caught:
            Safetensors(SafetensorsParams(format=format_)).check(facts, made_grid)
        assert caught.value.hint
        return caught.value

    @pytest.mark.parametrize(
        ("format_", "bits", "nearest"), [("gptq", 5, "w4a16"), ("gptq_v2", 6, "w8a16"), ("awq", 3, "w4a16")]
    )
    def test_bits(self, format_, bits, nearest, family):
        hint = self.refused(family, format_, grid(bits, 32)).hint
        assert "compressed-tensors" in hint
        assert nearest in hint

    def test_asymmetric_version_1(self, family):
        assert "gptq_v2" in self.refused(family, "gptq", grid(4, 32, symmetric=False)).hint

    @pytest.mark.parametrize("size", [8, 24, "tensor"])
    @pytest.mark.parametrize("format_", ["gptq", "awq"])
    def test_group_sizes(self, format_, size, family):
        assert "--group-size" in self.refused(family, format_, grid(4, size)).hint

    @pytest.mark.parametrize("format_", ["gptq", "gptq_v2", "awq"])
    def test_scales_that_would_be_rounded(self, format_, family):
        error = self.refused(family, format_, grid(4, 32), dtype="float32")
        assert "float32" in error.what
        assert "cast" in error.hint

    @pytest.mark.parametrize("format_", ["gptq", "awq"])
    def test_rows_that_fill_no_words(self, format_, family):
        error = self.refused(family, format_, grid(4, "channel"), intermediate_size=72)
        assert "72" in error.where
        assert "--ignore" in error.hint

    @pytest.mark.parametrize("format_", ["gptq", "gptq_v2", "awq"])
    def test_conv1d(self, format_, family):
        assert "Conv1D" in self.refused(family, format_, grid(4, 32), name="gpt2").where

    @pytest.mark.parametrize("format_", ["gptq", "gptq_v2", "awq"])
    def test_nothing_to_pack(self, format_, family):
        assert "nothing to pack" in self.refused(family, format_, None).what

    @pytest.mark.parametrize("format_", ["gptq", "gptq_v2", "awq"])
    def test_several_grids(self, format_, family):
        exporter = Safetensors(SafetensorsParams(format=format_))
        exporter.check_grids([grid(4, 32)])
        with pytest.raises(UsageError, match="several grids") as caught:
            exporter.check_grids([grid(4, 32), grid(4, 64)])
        assert "compressed-tensors" in caught.value.hint
        Safetensors(SafetensorsParams()).check_grids([grid(4, 32), grid(3, 64)])

    def test_overrides_that_make_several_grids(self, family):
        params = {"group_size": 32, "overrides": ({"pattern": "*.down_proj", "group_size": "channel"},)}
        with pytest.raises(UsageError, match="several grids"):
            make_plan(
                recipe(family("llama", dtype="float16"), ("rtn", params), export=("safetensors", {"format": "gptq"}))
            )

    def test_an_ignored_layer_is_no_reason(self, family):
        folder = family("llama", dtype="float16", intermediate_size=72)
        export = ("safetensors", {"format": "gptq"})
        with pytest.raises(UsageError, match="cannot hold"):
            make_plan(recipe(folder, ("rtn", {"group_size": "channel"}), export=export))
        make_plan(recipe(folder, ("rtn", {"group_size": "channel", "ignore": ("*.mlp.*",)}), export=export))
