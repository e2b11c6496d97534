#!/usr/bin/env bash
# Start train.py or test.py under SLURM, with one task per GPU: launch_slurm.sh SCRIPT ARGUMENT…
# SCRIPT is slurm_train.sh or slurm_test.sh, beside the Python script. Its second line documents the arguments.
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS set the resources.
set -euo pipefail
script=$1 command=train.py required=3
shift
if [[ $script == *test.sh ]]; then command=test.py required=4; fi
if [ $# -lt $required ]; then
    sed -n '2s/.*: /usage: /p' "$script" >&2
    exit 2
fi
partition=$1 job_name=$2
shift 2
gpus=${GPUS:-8} gpus_per_node=${GPUS_PER_NODE:-8}
if ! [[ $gpus =~ ^[1-9][0-9]*$ && $gpus_per_node =~ ^[1-9][0-9]*$ ]]; then
    echo "$script: GPUS=$gpus GPUS_PER_NODE=$gpus_per_node: the numbers of GPUs must be positive integers" >&2
    exit 2
fi
if [ "$gpus" -lt "$gpus_per_node" ]; then gpus_per_node=$gpus; fi
# shellcheck disable=SC2086 # SRUN_ARGS may contain several arguments
exec srun --partition="$partition" --job-name="$job_name" --gres="gpu:$gpus_per_node" --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$script")/$command" "$@" --launcher slurm
