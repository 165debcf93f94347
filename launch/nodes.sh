#!/usr/bin/env bash
# Run on several nodes: the same command on each, with HEAD (host name of node 0), NODES (number of nodes) and NODE
# (index of this node). With RESTARTS=3 the run resumes up to three times after a rank dies.
#   HEAD=node0 NODES=2 NODE=0 launch/nodes.sh recipe=llava_1_5 ...
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise restarted ranks look for the dead ones
: "${HEAD:?the host name of node 0}" "${NODES:?the number of nodes}" "${NODE:?the number of this node, from 0}"
NPROC="${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}"
exec torchrun --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node "$NPROC" \
  --rdzv_backend c10d --rdzv_endpoint "$HEAD:${PORT:-29500}" --rdzv_id "${RUN_ID:-vlmtrain}" \
  --max_restarts "${RESTARTS:-0}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown_timeout "${GRACE:-240}" \
  -m vlmtrain.train "$@"
