#!/bin/sh
# Set up the engines that an encoder is compared with, in environments of their own, as they pin other versions than
# llmopt: .build/engines/openvino (OpenVINO, NNCF) and .build/engines/optimum-onnx (optimum-onnx, CTranslate2 and the
# transformers that both want). Needs Python 3.11 or newer, PyPI, and some 6 GB. Then:
#
#   .venv/bin/python benchmarks/encoder.py MODEL --stsb FILE --text FILE --ours NAME=DIR
#
# Usage: benchmarks/engines/encoder_peers.sh [PYTHON]

set -eu
cd "$(dirname "$0")/../.."
install() {
  environment=.build/engines/$1
  shift
  test -x "$environment/bin/python" || "$python" -m venv "$environment"
  "$environment/bin/python" -m pip install --disable-pip-version-check --quiet "$@"
}
python=${1:-python3}
install openvino openvino==2026.4.1 nncf==3.4.0 onnx tokenizers numpy
install optimum-onnx "optimum-onnx[onnxruntime]==0.1.0" ctranslate2==4.8.5 tokenizers numpy
for name in openvino optimum-onnx; do
  .build/engines/$name/bin/python -m pip list 2>/dev/null |
    grep -E "^(openvino|nncf|optimum-onnx|onnxruntime|ctranslate2|torch|transformers) "
done
