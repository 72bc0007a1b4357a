#!/bin/sh
# Set up the tools that quantization is compared with, in environments of their own, as they pin other versions than
# llmopt: .build/engines/llm-compressor and .build/engines/gptqmodel. GPTQModel wants a torch that PyPI has for CUDA alone
# (6 GB; it computes on the processor all the same). Needs Python 3.11 or newer and PyPI. Then:
#
#   .venv/bin/python benchmarks/memory.py --peers
#
# Usage: benchmarks/engines/quantization_peers.sh [PYTHON]

set -eu
cd "$(dirname "$0")/../.."
install() {
  environment=.build/engines/$1
  shift
  test -x "$environment/bin/python" || "$python" -m venv "$environment"
  "$environment/bin/python" -m pip install --disable-pip-version-check --quiet "$@"
}
python=${1:-python3}
# llm-compressor takes any torch: the one that llmopt uses, where it is installed.
torch=$(.venv/bin/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" || echo torch)
install llm-compressor llmcompressor==0.14.0.1 "$torch"
install gptqmodel gptqmodel==7.7.0
for name in llm-compressor gptqmodel; do
  .build/engines/$name/bin/python -m pip list 2>/dev/null |
    grep -iE "^(llmcompressor|compressed.tensors|gptqmodel|torch|transformers) "
done
