#!/usr/bin/env bash
# Train under SLURM: [GPUS=8] slurm_train.sh PARTITION JOB_NAME CONFIG [ARGUMENT OF train.py …]
if [ $# -lt 3 ]; then echo "usage: $0 PARTITION JOB_NAME CONFIG [ARGUMENT OF train.py …]" >&2; exit 2; fi
here=$(dirname "$0")
exec bash "$here/../sepvit_lib/mm/launch_slurm.sh" "$here/train.py" "$@"
