#!/usr/bin/env bash
# Train under SLURM: slurm_train.sh PARTITION JOB_NAME CONFIG [ARGUMENT OF train.py …], GPUS=8 by default
exec bash "$(dirname "$0")/../sepvit_lib/mm/launch_slurm.sh" "$0" "$@"
