"""transformers: a Hugging Face folder, plain or compressed-tensors, opened with `from_pretrained`."""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import LlmoptError
from ..core.runtime import Arrays, Runtime, Session
from ..core.untrusted import UnreadableError, check_config, read_json

if TYPE_CHECKING:
    from torch import Tensor

PACKED = frozenset({"gptq", "awq"})
"""The `quant_method`s that transformers opens with other packages only; see packed.py."""


class TransformersSession(Session):
    """A model that `from_pretrained` has loaded.

    Args:
        model: the transformers model, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = model

    def outputs(self, inputs: Arrays) -> Arrays:
        """Run one full forward pass without past; see `core.runtime.Session`."""
        import numpy as np
        import torch

        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        if "token_type_ids" not in signature(self.model.forward).parameters:
            tensors.pop("token_type_ids", None)  # a tokenizer may make them for a model that has none
        with torch.inference_mode(), _silent():
            made = self.model(**tensors, return_dict=True)
        return {name: value.float().numpy() for name, value in made.items() if isinstance(value, torch.Tensor)}

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Continue `prompt` greedily; see `core.runtime.Session`."""
        import torch

        if not self.model.can_generate():
            raise LlmoptError(f"{type(self.model).__name__} does not generate text")
        ids = torch.tensor([list(prompt)])
        with _silent():
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                min_new_tokens=max_new_tokens,
                max_new_tokens=max_new_tokens,
                repetition_penalty=1.0,
                pad_token_id=0,
            )
        start = 1 if self.model.config.is_encoder_decoder else len(prompt)  # a decoder of its own begins anew
        return made[0, start:].tolist()

    def adapt(self, adapter: Path) -> None:
        """Load a folder with peft; see `core.runtime.Session`."""
        from peft import PeftModel
        from safetensors import SafetensorError

        try:
            adapted = PeftModel.from_pretrained(self.model, str(adapter), torch_device="cpu", use_safetensors=True)
        except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise LlmoptError(
                f"peft does not load `{adapter}`", where=f"{type(error).__name__}: {error}"[:2000]
            ) from error
        self.model = adapted.get_base_model().eval()  # its layers are adapted in place

    def close(self) -> None:
        """Free the model now, not at some later collection: layers that were packed refer to themselves."""
        self.model = None
        gc.collect()


def _silent() -> contextlib.AbstractContextManager[Any]:
    """Keep compressed-tensors' progress bars off stderr; it draws them at loading and at the first run."""
    return contextlib.redirect_stderr(io.StringIO())


class Transformers(Runtime):
    """The transformers library on this machine's CPU, computing in float32."""

    name = "transformers"

    def version(self) -> str:
        """Return name and version."""
        from importlib.metadata import version

        return f"transformers {version('transformers')}"

    def opens(self, directory: Path) -> bool:
        """Return whether `directory` is a Hugging Face model folder with safetensors that transformers reads alone."""
        return is_model_folder(directory) and quant_method(directory) not in PACKED

    def open(
        self,
        directory: Path,
        *,
        threads: int | None = None,
        parallel: int = 1,  # noqa: ARG002
    ) -> TransformersSession:
        """Load the folder with `from_pretrained`, in float32."""
        return load(directory, threads=threads)


def is_model_folder(directory: Path) -> bool:
    """Return whether `directory` holds config.json and safetensors."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def quant_method(directory: Path) -> str | None:
    """Return `quant_method` of a folder's config.json, None where there is none."""
    try:
        config = read_json(directory / "config.json")
        return config["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def runtime_config(directory: Path) -> dict[str, Any]:
    """Return a folder's config.json.

    Raises:
        LlmoptError: it is none, or makes no model.
    """
    try:
        config = read_json(directory / "config.json")
        check_config(config)
    except (UnreadableError, AttributeError) as error:
        hint = "build the artifact again, or fetch the model again"
        raise LlmoptError("config.json is damaged", where=f"{directory}\n{error}", hint=hint) from None
    return config


def load(
    directory: Path, *, threads: int | None = None, weights: Callable[[], Mapping[str, Tensor]] | None = None
) -> TransformersSession:
    """Load a folder with `from_pretrained`, in float32.

    Args:
        directory: the folder.
        threads: threads to compute with, all cores when None.
        weights: makes the checkpoint's tensors, to be taken for what the shards hold packed.

    Raises:
        LlmoptError: it does not load, or a weight is missing.
    """
    import torch
    import transformers

    if threads is not None:
        torch.set_num_threads(threads)
    config = runtime_config(directory)
    name = (config.get("architectures") or [""])[0]
    kind: Any = getattr(transformers, name, None) or transformers.AutoModel
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    try:
        with _silent():
            if weights is None:
                model, info = kind.from_pretrained(directory, **options)
            else:
                config.pop("quantization_config", None)
                made = transformers.AutoConfig.for_model(**config)
                model, info = kind.from_pretrained(None, config=made, state_dict=dict(weights()), **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise LlmoptError(
            f"transformers does not load `{directory}`", where=f"{type(error).__name__}: {error}"[:2000]
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
    missing = [str(key) for key in (info.get("missing_keys") or ())]
    if missing and all(key.startswith("pooler.") for key in missing):
        missing, model.pooler = [], None  # a base model without a pooler gives hidden states alone
    if missing or info.get("mismatched_keys"):
        wrong = missing or [str(key) for key in info["mismatched_keys"]]
        raise LlmoptError(f"transformers finds weights missing in `{directory}`", where=", ".join(sorted(wrong)[:5]))
    _unpack(model)
    return TransformersSession(model.eval())


def _unpack(model: Any) -> None:
    """Let compressed-tensors unpack the weights now, and not at the first run: nvfp4 and mxfp4 become bfloat16."""
    import torch

    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None and hasattr(model, "ct_decompress_hook"):
        with _silent():
            compressor.decompress_model(model)
        model.to(torch.float32)
