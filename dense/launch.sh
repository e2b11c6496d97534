#!/usr/bin/env bash
# Start a script in several processes on one or more nodes: launch.sh SCRIPT PROCESSES ARGUMENT…
# PORT (29500), NNODES (1), NODE_RANK (0) and MASTER_ADDR (127.0.0.1) set the rendezvous.
set -euo pipefail
script=$1 processes=$2
shift 2
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "$0: $processes: the number of processes (GPUs) has to be a number from 1" >&2
    exit 2
fi
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" --nproc_per_node="$processes" \
    "$script" "$@" --launcher pytorch
