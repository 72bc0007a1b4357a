"""Turn a transformer into an artifact that a real runtime loads: quantize, export, verify."""

__version__ = "0.1.0"
