#!/usr/bin/env bash
# Test on several GPUs (or CPU processes): dist_test.sh CONFIG CHECKPOINT PROCESSES [ARGUMENT OF test.py …]
if [ $# -lt 3 ]; then echo "usage: $0 CONFIG CHECKPOINT PROCESSES [ARGUMENT OF test.py …]" >&2; exit 2; fi
here=$(dirname "$0")
exec bash "$here/../sepvit_lib/mm/launch.sh" "$here/test.py" "$3" "$1" "$2" "${@:4}"
