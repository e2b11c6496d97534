#!/usr/bin/env bash
# Train on several nodes, one process per GPU. Resumes automatically after preemption, the time limit or a lost process:
#
#     sbatch --nodes=4 tools/slurm/train.sh --model SepViT_Tiny --batch-size 64 --data-path imagenet --output_dir tiny
#
# Submit it from the repository's folder. sbatch's options come before the script, main.py's arguments after it. PYTHON
# is the interpreter. SLURM sends SIGUSR1 two minutes before the time limit: the run saves, and the job is requeued.
#SBATCH --job-name=sepvit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun no longer inherits it from the job
exec bash tools/slurm/requeue.sh srun "${PYTHON:-python3}" main.py --auto-resume \
    --num_workers "${SLURM_CPUS_PER_TASK:-10}" "$@"
