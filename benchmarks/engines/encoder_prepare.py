"""Make a peer's form of an encoder; runs in that peer's environment (see encoder_peers.sh) and knows nothing of llmopt.

    python benchmarks/engines/encoder_prepare.py FORM MODEL OUT [--source FILE] [--texts FILE] [--length 256]

FORM is one of:
    exporters     transformers.exporters, then its fusions for ONNX Runtime on CPU (llmopt's own environment has it)
    optimum       optimum-onnx's export as it is; OpenVINO opens it too
    optimum-o3    optimum-onnx's O3 of SOURCE, a folder of form `optimum`
    optimum-int8  optimum-onnx's INT8 for AVX512-VNNI of SOURCE: dynamic activations, channel by channel
    ctranslate2   CTranslate2's converter; it quantizes when it loads
    nncf          NNCF's post-training INT8 for transformers of SOURCE, calibrated on TEXTS (a JSON list)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

GRAPH = "model.onnx"


def exporters(model: str, out: Path, **_: Any) -> None:
    import onnx_ir as ir
    import torch
    from torch.export import Dim
    from transformers import AutoModel
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    module = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    # Sizes that differ from one another and from 1, which the tracer would take for constants.
    inputs = {name: torch.ones(2, 3, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        program, _ = OnnxExporter().export_program(module, inputs, OnnxConfig(dynamic_shapes=shapes))
    graph = getattr(program, "model", program)
    fuse_for_onnxruntime(graph, "cpu")
    ir.save(graph, out / GRAPH)


def optimum(model: str, out: Path, **_: Any) -> None:
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    ORTModelForFeatureExtraction.from_pretrained(model, export=True).save_pretrained(out)


def optimum_o3(model: str, out: Path, source: Path, **_: Any) -> None:
    del model
    from optimum.onnxruntime import AutoOptimizationConfig, ORTModelForFeatureExtraction, ORTOptimizer

    optimizer = ORTOptimizer.from_pretrained(ORTModelForFeatureExtraction.from_pretrained(source))
    optimizer.optimize(save_dir=out, optimization_config=AutoOptimizationConfig.O3(), file_suffix="")


def optimum_int8(model: str, out: Path, source: Path, **_: Any) -> None:
    del model
    from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForFeatureExtraction, ORTQuantizer

    quantizer = ORTQuantizer.from_pretrained(ORTModelForFeatureExtraction.from_pretrained(source))
    wanted = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    quantizer.quantize(save_dir=out, quantization_config=wanted, file_suffix="")


def ctranslate2(model: str, out: Path, **_: Any) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(model).convert(str(out), force=True)


def nncf(model: str, out: Path, source: Path, texts: list[str], length: int) -> None:
    import nncf as library
    import numpy as np
    import openvino
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    graph = openvino.Core().read_model(source / GRAPH)
    names = [name.any_name for name in graph.inputs]

    def inputs(text: str) -> dict[str, Any]:
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        filled = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        return {name: filled[name] for name in names}

    quantized = library.quantize(
        graph, library.Dataset(texts, inputs), model_type=library.ModelType.TRANSFORMER, subset_size=len(texts)
    )
    openvino.save_model(quantized, out / "model.xml", compress_to_fp16=False)


FORMS = {
    "exporters": exporters,
    "optimum": optimum,
    "optimum-o3": optimum_o3,
    "optimum-int8": optimum_int8,
    "ctranslate2": ctranslate2,
    "nncf": nncf,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = json.loads(args.texts.read_text()) if args.texts else []
    FORMS[args.form](args.model, args.out, source=args.source, texts=texts, length=args.length)


if __name__ == "__main__":
    main()
