#!/usr/bin/env bash
# Run on one node: on all its GPUs, or NPROC processes. With RESTARTS=3 the run resumes up to three times after a rank
# dies.
#   launch/node.sh recipe=llava_1_5 data.images=... data.align=... data.instruct=...
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise restarted ranks look for the dead ones
NPROC="${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}"
exec torchrun --standalone --nproc_per_node "$NPROC" --max_restarts "${RESTARTS:-0}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown_timeout "${GRACE:-240}" \
  -m vlmtrain.train "$@"
