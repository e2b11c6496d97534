#!/usr/bin/env bash
# Train on several GPUs (or CPU processes): dist_train.sh CONFIG PROCESSES [ARGUMENT OF train.py …]
exec bash "$(dirname "$0")/../sepvit_lib/mm/launch.sh" "$0" "$@"
