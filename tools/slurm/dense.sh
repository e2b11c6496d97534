#!/usr/bin/env bash
# Train a segmentor or detector on one or more nodes, one process per GPU. Resumes automatically, as train.sh does:
#
#     sbatch tools/slurm/dense.sh segmentation configs/fpn_sepvit_t_512x512_80k_ade20k.py --checkpoint-every 1000
#
# Submit it from the repository's folder. sbatch's options come before the script, train.py's arguments after
# `segmentation` or `detection`. Paths are relative to that folder. PYTHON is the Python interpreter to use.
#SBATCH --job-name=sepvit-dense
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
root=${SLURM_SUBMIT_DIR:-.}
if [[ ${1:-} != segmentation && ${1:-} != detection ]]; then
    echo "dense.sh: ${1:-}: takes the task first, segmentation or detection" >&2
    exit 2
fi
cd "$root/$1" || exit 2
shift
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun no longer inherits it from the job
exec bash ../tools/slurm/requeue.sh srun "${PYTHON:-python3}" train.py "$@" --auto-resume --launcher slurm
