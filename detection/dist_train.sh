#!/usr/bin/env bash
# Train on several GPUs (or CPU processes): dist_train.sh CONFIG PROCESSES [ARGUMENT OF train.py …]
if [ $# -lt 2 ]; then echo "usage: $0 CONFIG PROCESSES [ARGUMENT OF train.py …]" >&2; exit 2; fi
here=$(dirname "$0")
exec bash "$here/../sepvit_lib/mm/launch.sh" "$here/train.py" "$2" "$1" "${@:3}"
