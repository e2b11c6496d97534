#!/usr/bin/env bash
# Start train.py or test.py in several processes on one or more nodes: launch.sh SCRIPT ARGUMENT…
# SCRIPT is dist_train.sh or dist_test.sh, beside the Python script. Its second line documents the arguments.
# launch.py lists the environment variables that set the rendezvous; PYTHON is the Python interpreter to use.
set -euo pipefail
script=$1 command=train.py before=1 # arguments before PROCESSES
shift
if [[ $script == *test.sh ]]; then command=test.py before=2; fi
if [ $# -le $before ]; then
    sed -n '2s/.*: /usage: /p' "$script" >&2
    exit 2
fi
processes=${*:before + 1:1}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "$script: $processes: the number of processes (GPUs) must be a positive integer" >&2
    exit 2
fi
exec "${PYTHON:-python}" "$(dirname "$0")/launch.py" "$(dirname "$script")/$command" "$processes" \
    "${@:1:before}" "${@:before + 2}" --launcher pytorch
