#!/usr/bin/env bash
# Measure one GPU, offline: bash bench_gpu.sh --out DIR (docs/one-gpu.md says what it measures).
# --device cpu --tiny rehearses it on a CPU; bash bench_gpu.sh --help lists all options.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" "$here/bench_gpu.py" "$@"
