#!/usr/bin/env bash
# Test under SLURM: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [ARGUMENT OF test.py …], GPUS=8 by default
exec bash "$(dirname "$0")/../sepvit_lib/mm/launch_slurm.sh" "$0" "$@"
