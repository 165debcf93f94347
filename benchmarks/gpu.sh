#!/usr/bin/env bash
# Tests, speed and a profile on one GPU, at most 12 minutes: benchmarks/gpu.sh [--out FOLDER], options as of gpu.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}" # the Trainer would use all GPUs
python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python="$(command -v "${PYTHON:-python3}")"
exec "$python" benchmarks/gpu.py "$@"
