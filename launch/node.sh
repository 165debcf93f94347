#!/usr/bin/env bash
# One node: all its GPUs, or NPROC processes.
#   launch/node.sh recipe=llava_1_5 data.images=... data.align=... data.instruct=...
set -euo pipefail
NPROC="${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}"
exec torchrun --standalone --nproc_per_node "$NPROC" -m vlmtrain.train "$@"
