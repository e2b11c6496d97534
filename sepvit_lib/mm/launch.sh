#!/usr/bin/env bash
# Start a script in several processes on one or more nodes: launch.sh SCRIPT PROCESSES ARGUMENT…
# launch.py lists the environment variables that set the rendezvous; PYTHON is the Python to use.
set -euo pipefail
if ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "$0: $2: the number of processes (GPUs) must be a positive integer" >&2
    exit 2
fi
exec "${PYTHON:-python}" "$(dirname "$0")/launch.py" "$@" --launcher pytorch
