"""How an engine loads what was exported: lines to copy."""

from __future__ import annotations

from ..core.adapter import FOLDER
from ..core.manifest import ExportRecord
from ..evaluation.report.document import Snippet

_COMPRESSED = {"auto", "compressed-tensors"}
_PACKED = {"gptq", "gptq_v2", "awq"}
"""Layouts that transformers opens only with further packages; vLLM has kernels for them."""


def snippets(record: ExportRecord, path: str, architecture: str) -> list[Snippet]:
    """Return how to load an export, for each engine that does, the nearest first.

    Args:
        record: the export.
        path: its folder, as it stands in the code.
        architecture: of the model, which decides the class of transformers.
    """
    if record.name == "safetensors":
        found = _safetensors(record, path, causal=architecture.endswith(("ForCausalLM", "LMHeadModel")))
    elif record.name == "onnx":
        call = f"session = onnxruntime.InferenceSession({f'{path}/model.onnx'!r})"
        found = [("ONNX Runtime", f"import onnxruntime\n\n{call}")]
    elif record.name == "onnx-genai":
        call = f"model = og.Model({path!r})\ntokenizer = og.Tokenizer(model)"
        found = [("ONNX Runtime GenAI", f"import onnxruntime_genai as og\n\n{call}")]
    elif record.name == "openvino":
        call = f"model = openvino.compile_model({f'{path}/openvino_model.xml'!r}, 'CPU')"
        found = [("OpenVINO", f"import openvino\n\n{call}")]
    else:
        found = []
    return [Snippet(engine=engine, language="python", code=code) for engine, code in found]


def _safetensors(record: ExportRecord, path: str, *, causal: bool) -> list[tuple[str, str]]:
    kind = "AutoModelForCausalLM" if causal else "AutoModel"
    if record.adapted is not None:
        return _with_adapter(record, path, kind)
    plain = ("transformers", f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({path!r})")
    vllm = ("vLLM", f"import vllm\n\nmodel = vllm.LLM({path!r})")
    if record.params.get("format") in _PACKED:
        return [vllm]
    return [plain, vllm] if causal else [plain]


def _with_adapter(record: ExportRecord, path: str, kind: str) -> list[tuple[str, str]]:
    """Return how to load a base and the adapter beside it; peft adapts layers that have a weight, so it is unpacked."""
    packed = record.params.get("format") in _COMPRESSED
    how = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if packed else ""
    names = f"{kind}, CompressedTensorsConfig" if packed else kind
    adapter = f"{path}/{FOLDER}"
    peft = (
        f"from peft import PeftModel\nfrom transformers import {names}\n\n"
        f"base = {kind}.from_pretrained({path!r}{how})\nmodel = PeftModel.from_pretrained(base, {adapter!r})"
    )
    vllm = (
        "import vllm\nfrom vllm.lora.request import LoRARequest\n\n"
        f"model = vllm.LLM({path!r}, enable_lora=True)  # max_lora_rank=N where its rank is above 16\n"
        f"adapter = LoRARequest('recovered', 1, {adapter!r})\n"
        "made = model.generate(prompts, lora_request=adapter)"
    )
    engines = [("vLLM", vllm)] if kind == "AutoModelForCausalLM" else []
    return engines if record.params.get("format") in _PACKED else [("peft", peft), *engines]
