#!/usr/bin/env bash
# Test under SLURM: [GPUS=8] slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [ARGUMENT OF test.py …]
if [ $# -lt 4 ]; then echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [ARGUMENT OF test.py …]" >&2; exit 2; fi
here=$(dirname "$0")
exec bash "$here/../sepvit_lib/mm/launch_slurm.sh" "$here/test.py" "$@"
