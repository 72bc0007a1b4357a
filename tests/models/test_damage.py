"""Damaged, incomplete and foreign models: one message with a hint each, and never a traceback of another kind."""

import json
import shutil
import struct

import pytest
import torch
from helpers import open_model, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.recipe import ModelSpec
from llmopt.models.checkpoint import Checkpoint, read_header
from llmopt.models.locate import locate
from llmopt.pipeline.plan import make_plan
from safetensors.torch import load_file, save_file

AGAIN = "the checkpoint is damaged: fetch or save it again"
INCOMPLETE = "the checkpoint is incomplete: fetch or save it again"


@pytest.fixture
def model(family, tmp_path):
    """Return a copy of the tiny Llama that may be damaged."""
    return shutil.copytree(family("llama"), tmp_path / "model")


@pytest.fixture
def sharded(family, tmp_path):
    return shutil.copytree(family("llama", shard="100KB"), tmp_path / "model")


def read_all(folder, work):
    handle = open_model(folder, work)
    handle.skeleton()
    return dict(handle.tensors())


def refused(folder, work=None):
    """Read the model as a run does; return the error."""
    with pytest.raises(LlmoptError) as caught:
        read_all(folder, (work or folder).parent / "work")
    error = caught.value
    assert error.what
    assert "\n" not in error.what
    assert not error.what.endswith(".")
    assert str(error).startswith("error: ")
    assert error.exit_code == (2 if isinstance(error, UsageError) else 1)
    return error


def rewrite(folder, change):
    """Change the header of a shard, `change(header)`, and leave the data as it is."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def retensor(folder, change):
    """Change the tensors of a model with one shard, `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def reconfigure(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


UP = "model.layers.1.mlp.up_proj.weight"


class TestShards:
    @pytest.mark.parametrize("size", [0, 3, 8, 100, -1])
    def test_truncated(self, model, size):
        path = model / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        error = refused(model)
        assert error.what == "model.safetensors is damaged"
        assert error.hint == AGAIN
        assert str(path) in (error.where or "")

    @pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**7])
    def test_header_length_that_lies(self, model, length):
        path = model / "model.safetensors"
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        error = refused(model)
        assert error.what == "model.safetensors is damaged"
        assert error.hint == AGAIN

    @pytest.mark.parametrize(
        "junk", [b"not json", b"[1, 2]", b"\xff\xfe{}", b'{"a": 3}', b'{"a": {}}', b"null", b'"x"']
    )
    def test_header_that_is_no_header(self, model, junk):
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(junk)) + junk)
        error = refused(model)
        assert error.what == "model.safetensors is damaged"
        assert "header" in (error.where or "")
        assert error.hint == AGAIN

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
            {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": [0]},
            {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]},
            {"dtype": "F32", "shape": [1], "data_offsets": None},
            {"dtype": "F32", "shape": [1]},
            {"dtype": None, "shape": [1], "data_offsets": [0, 4]},
            {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]},
        ],
        ids=str,
    )
    def test_entry_that_is_no_entry(self, model, entry):
        text = json.dumps({"a": entry}).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
        assert refused(model).what == "model.safetensors is damaged"

    def test_size_that_lies(self, model):
        rewrite(model, lambda header: header[UP].update(shape=[960, 64]))
        error = refused(model)
        assert error.what == "model.safetensors is damaged"
        assert f"`{UP}` [960, 64] float32 takes 245760 bytes, its offsets say 24576" in (error.where or "")

    def test_tensors_that_overlap(self, model):
        def overlap(header):
            begin, end = header[UP]["data_offsets"]
            header[UP]["data_offsets"] = [begin - 4, end - 4]

        rewrite(model, overlap)
        assert refused(model).what == "model.safetensors is damaged"

    def test_bytes_beyond_the_last_tensor(self, model):
        with (model / "model.safetensors").open("ab") as stream:
            stream.write(b"\0" * 64)
        error = refused(model)
        assert "its tensors take" in (error.where or "")

    def test_unknown_dtype(self, model):
        rewrite(model, lambda header: header[UP].update(dtype="F13"))
        error = refused(model)
        assert f"`{UP}` has the unknown dtype 'F13'" in (error.where or "")

    def test_no_tensor_at_all(self, model):
        save_file({}, model / "model.safetensors")
        assert refused(model).what == "the checkpoint holds no tensor"

    def test_every_dtype_of_the_library_is_known(self, tmp_path):
        kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
        kinds += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
        tensors = {str(kind): torch.zeros(3).to(kind) for kind in kinds}
        save_file(tensors, tmp_path / "all.safetensors")
        found = read_header(tmp_path / "all.safetensors")
        assert {name: f"torch.{info.dtype}" for name, info in found.items()} == {str(kind): str(kind) for kind in kinds}
        assert {name: info.nbytes for name, info in found.items()} == {name: t.nbytes for name, t in tensors.items()}


class TestIndex:
    def test_a_sharded_model_is_read_like_one_in_one_file(self, sharded, family, tmp_path):
        assert len(list(sharded.glob("*.safetensors"))) > 3
        many, one = Checkpoint(sharded), Checkpoint(family("llama"))
        assert sorted(many.tensors) == sorted(one.tensors)
        assert all(many.read(name).equal(one.read(name)) for name in one.tensors)
        assert many.nbytes == one.nbytes

    def test_missing_shard(self, sharded):
        gone = sorted(sharded.glob("*.safetensors"))[1]
        gone.unlink()
        error = refused(sharded)
        assert error.what == f"shard {gone.name} is missing"
        assert error.hint == INCOMPLETE

    def change(self, folder, change):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    @pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "", ".", "..", 7, None, ["x"]])
    def test_pointing_outside_the_folder(self, sharded, file):
        self.change(sharded, lambda index: index["weight_map"].update({UP: file}))
        error = refused(sharded)
        assert error.what == "model.safetensors.index.json points outside its folder"
        assert repr(file) in (error.where or "")

    def test_a_weight_that_its_shard_does_not_hold(self, sharded):
        self.change(sharded, lambda index: index["weight_map"].update({"extra.weight": index["weight_map"][UP]}))
        error = refused(sharded)
        assert error.what == "weight `extra.weight` is missing"
        assert error.hint == INCOMPLETE

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "null"])
    def test_no_index(self, sharded, text):
        (sharded / "model.safetensors.index.json").write_text(text)
        error = refused(sharded)
        assert error.what == "model.safetensors.index.json is damaged"


class TestWeights:
    def test_missing(self, model):
        retensor(model, lambda tensors: tensors.pop(UP))
        error = refused(model)
        assert error.what == f"weight `{UP}` is missing from the checkpoint"
        assert "LlamaForCausalLM" in (error.where or "")
        assert error.hint

    def test_another_shape_than_the_config_says(self, model):
        retensor(model, lambda tensors: tensors.update({UP: torch.zeros(80, 64)}))
        error = refused(model)
        assert error.what == f"weight `{UP}` has another shape than config.json says"
        assert "[80, 64]" in (error.where or "")
        assert "[96, 64]" in (error.where or "")

    def test_another_width_of_the_whole_model(self, model):
        reconfigure(model, hidden_size=128)
        assert "has another shape than config.json says" in refused(model).what

    @pytest.mark.parametrize("more", [3, 1])
    def test_another_number_of_layers(self, model, more):
        reconfigure(model, num_hidden_layers=more)
        if more == 3:
            assert refused(model).what.startswith("weight `model.layers.2.")
        else:
            with pytest.raises(LlmoptError, match="has no place for"):
                open_model(model, model.parent / "work").skeleton()

    @pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
    def test_a_missing_expert(self, name, family, tmp_path):
        folder = shutil.copytree(family(name), tmp_path / "model")
        gone = next(key for key in Checkpoint(folder).tensors if ".experts.2." in key)
        retensor(folder, lambda tensors: tensors.pop(gone))
        error = refused(folder)
        assert "experts" in error.what
        assert error.hint

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_not_a_number(self, value, dtype, family, tmp_path):
        folder = shutil.copytree(family("llama", dtype=dtype), tmp_path / "model")

        def spoil(tensors):
            tensors[UP][3, 4] = value

        retensor(folder, spoil)
        error = refused(folder)
        assert error.what == f"weight `{UP}` holds NaN or Inf"
        assert error.where == "1 of 6144 values, in model.safetensors"
        assert error.hint == AGAIN
        with pytest.raises(LlmoptError) as caught:
            list(Checkpoint(folder).rows(UP, 1))
        assert str(caught.value) == str(error)

    def test_a_large_sum_is_no_infinity(self, model):
        retensor(model, lambda tensors: tensors.update({UP: torch.full((96, 64), 3e38)}))
        assert Checkpoint(model).read(UP).max() == 3e38

    def test_opposite_infinities(self, model):
        def spoil(tensors):
            tensors[UP][0, 0], tensors[UP][0, 1] = float("inf"), float("-inf")

        retensor(model, spoil)
        assert refused(model).where == "2 of 6144 values, in model.safetensors"


class TestFolders:
    def refused(self, spec):
        with pytest.raises(LlmoptError) as caught:
            locate(spec if isinstance(spec, ModelSpec) else ModelSpec(id=str(spec)))
        return caught.value

    def test_missing(self, tmp_path):
        (tmp_path / "llama").mkdir()
        error = self.refused(tmp_path / "lama")
        assert error.what == f"no model at `{tmp_path / 'lama'}`"
        assert "did you mean `" in (error.hint or "")
        assert (error.hint or "").endswith("llama`?")
        assert error.exit_code == 2

    def test_a_file(self, model):
        error = self.refused(model / "config.json")
        assert error.what.endswith("is a file, not a model folder")
        assert error.hint == "give the folder that holds config.json"

    def test_no_config(self, model):
        (model / "config.json").unlink()
        error = self.refused(model)
        assert error.what == f"`{model}` is not a model folder"
        assert error.exit_code == 2
        assert error.hint

    def test_no_weights(self, model):
        (model / "model.safetensors").unlink()
        assert self.refused(model).what == f"`{model}` holds no weights"

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "tf_model.h5"])
    def test_only_pickles(self, model, name):
        (model / "model.safetensors").rename(model / name)
        error = self.refused(model)
        assert error.what == f"`{model}` holds pickled weights only"
        assert name in (error.where or "")
        assert "save_pretrained" in (error.hint or "")
        assert error.exit_code == 2

    @pytest.mark.parametrize("text", ["", "{", "\x00"])
    def test_config_that_is_not_json(self, model, text):
        (model / "config.json").write_text(text)
        assert refused(model).what == "config.json is not valid JSON"

    def test_config_that_is_no_object(self, model):
        (model / "config.json").write_text("[]")
        assert refused(model).what == "config.json is not an object"

    def test_code_that_was_not_asked_for(self, model):
        reconfigure(model, auto_map={"AutoModel": "modeling_x.X"}, model_type="x", architectures=["X"])
        error = self.refused(model)
        assert "needs Python code of its own (X)" in error.what
        assert "--trust-remote-code" in (error.hint or "")
        locate(ModelSpec(id=str(model), trust_remote_code=True))

    def test_code_beside_a_model_that_transformers_knows_is_not_needed(self, model):
        reconfigure(model, auto_map={"AutoModel": "modeling_x.X"})
        assert locate(ModelSpec(id=str(model))).folder == model
        open_model(model, model.parent / "work").skeleton()


class TestArchitectures:
    def test_unknown_model_type(self, model):
        reconfigure(model, model_type="nonsense")
        error = refused(model)
        assert "has an architecture that transformers" in error.what
        assert error.exit_code == 2
        assert "model_type" in (error.hint or "")

    def test_no_model_type(self, model):
        reconfigure(model, model_type=...)
        assert refused(model).exit_code == 2

    @pytest.mark.parametrize("architectures", [[], None, ...])
    def test_none_named(self, model, architectures):
        reconfigure(model, architectures=architectures)
        error = refused(model)
        assert error.what == "config.json names no architecture"
        assert "LlamaForCausalLM" in (error.hint or "")
        assert error.exit_code == 2

    @pytest.mark.parametrize("name", ["LlamaForNothing", "BertTokenizer", "AutoConfig"])
    def test_unknown_one_named(self, model, name):
        reconfigure(model, architectures=[name])
        assert refused(model).exit_code == 2

    @pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
    @pytest.mark.parametrize("value", ["many", -1, 0])
    def test_config_values_that_make_no_model(self, model, field, value):
        reconfigure(model, **{field: value})
        error = refused(model)
        assert error.hint or error.what.startswith("no repeated blocks")

    def test_quantized_already(self, model):
        reconfigure(model, quantization_config={"quant_method": "gptq", "bits": 4})
        for read in (lambda: open_model(model, model.parent / "work").skeleton(), lambda: make_plan(recipe(model))):
            with pytest.raises(UsageError) as caught:
                read()
            assert caught.value.what == f"`{model}` is quantized already"
            assert "gptq" in (caught.value.where or "")
            assert caught.value.hint == "start from the floating-point model"

    def test_no_repeated_blocks(self, tmp_path):
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=0, num_attention_heads=2
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        error = refused(tmp_path / "model")
        assert error.what == "no repeated blocks found in LlamaForCausalLM"


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch, family):
        """Replace the hub: `hub["answer"]` is a folder or an error; `hub["asked"]` is what was asked for."""
        import huggingface_hub

        state = {"answer": family("llama"), "asked": None}

        def snapshot_download(name, **options):
            state["asked"] = (name, options)
            if isinstance(state["answer"], Exception):
                raise state["answer"]
            return str(state["answer"])

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return state

    def test_a_hub_id(self, hub, family, tmp_path):
        location = locate(ModelSpec(id="org/name", revision="v1"))
        assert location.folder == family("llama")
        assert location.source == "org/name"
        name, options = hub["asked"]
        assert (name, options["revision"]) == ("org/name", "v1")
        assert "*.py" not in options["allow_patterns"]
        assert not [pattern for pattern in options["allow_patterns"] if pattern.endswith((".bin", ".pt"))]
        assert make_plan(recipe("org/name")).facts.source == "org/name"

    def test_code_is_fetched_only_when_asked_for(self, hub):
        locate(ModelSpec(id="org/name", trust_remote_code=True))
        assert "*.py" in hub["asked"][1]["allow_patterns"]

    def test_what_a_model_on_this_machine_does_not_heed(self, hub, family, tmp_path):
        with pytest.raises(UsageError, match="revisions are those of the hub"):
            locate(ModelSpec(id=str(family("llama")), revision="main"))
        (tmp_path / "model.onnx").write_bytes(b"")
        for name in (tmp_path, tmp_path / "model.onnx"):
            with pytest.raises(UsageError, match="an ONNX graph has its own"):
                locate(ModelSpec(id=str(name), task="fill-mask"))
            assert locate(ModelSpec(id=str(name))).graph == tmp_path / "model.onnx"
        assert hub["asked"] is None

    def test_a_path_is_never_asked_of_the_hub(self, hub, tmp_path):
        for name in ("./missing", "../missing", "~/missing", str(tmp_path / "missing"), "a/b/c", "a\\b"):
            with pytest.raises(UsageError):
                locate(ModelSpec(id=name))
        assert hub["asked"] is None

    def raised(self, hub, error):
        hub["answer"] = error
        with pytest.raises(LlmoptError) as caught:
            locate(ModelSpec(id="org/name"))
        assert caught.value.hint
        return caught.value

    def test_offline(self, hub, monkeypatch):
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert "the hub did not answer" in (self.raised(hub, LocalEntryNotFoundError("x")).where or "")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert "HF_HUB_OFFLINE is set" in (self.raised(hub, LocalEntryNotFoundError("x")).where or "")

    def test_no_such_repository(self, hub):
        from types import SimpleNamespace

        from huggingface_hub.errors import RepositoryNotFoundError

        response = SimpleNamespace(headers={}, request=None)
        error = self.raised(hub, RepositoryNotFoundError("not found\nmore", response=response))
        assert error.what == "the hub does not give `org/name`"
        assert "--revision" in (error.hint or "")

    def test_a_name_that_cannot_be_one(self, hub):
        from huggingface_hub.errors import HFValidationError

        error = self.raised(hub, HFValidationError("bad"))
        assert error.what == "no model at `org/name`"
        assert error.exit_code == 2

    def test_no_answer_without_a_message(self, hub):
        assert self.raised(hub, OSError()).exit_code == 1
