"""ONNX graphs: what passes and exporters know of them. Nothing here touches torch."""
