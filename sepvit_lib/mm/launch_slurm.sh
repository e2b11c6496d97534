#!/usr/bin/env bash
# Start a script with SLURM, one task per GPU: launch_slurm.sh SCRIPT PARTITION JOB_NAME ARGUMENT…
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS set the resources.
set -euo pipefail
script=$1 partition=$2 job_name=$3
shift 3
gpus=${GPUS:-8} gpus_per_node=${GPUS_PER_NODE:-8}
if ! [[ $gpus =~ ^[1-9][0-9]*$ && $gpus_per_node =~ ^[1-9][0-9]*$ ]]; then
    echo "$0: GPUS=$gpus GPUS_PER_NODE=$gpus_per_node: the numbers of GPUs must be positive integers" >&2
    exit 2
fi
if [ "$gpus" -lt "$gpus_per_node" ]; then gpus_per_node=$gpus; fi
# shellcheck disable=SC2086 # SRUN_ARGS may contain several arguments
exec srun --partition="$partition" --job-name="$job_name" --gres="gpu:$gpus_per_node" --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$script" "$@" --launcher slurm
