#!/usr/bin/env bash
# Test on several GPUs (or CPU processes): dist_test.sh CONFIG CHECKPOINT PROCESSES [ARGUMENT OF test.py …]
exec bash "$(dirname "$0")/../sepvit_lib/mm/launch.sh" "$0" "$@"
