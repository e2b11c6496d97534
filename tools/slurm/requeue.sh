#!/usr/bin/env bash
# Run a training command in a SLURM job, and requeue the job until the run is complete: requeue.sh COMMAND…
#
# The job is requeued if the command exits with status 75 (it has saved and stopped, or lost a process) or is killed, at
# most MAX_REQUEUES (100) times. After a user's mistake or a bug, it is not requeued.
set -uo pipefail
"$@"
status=$?
case $status in
    # saved and stopped, lost a process, or was killed (128 + ABRT, BUS, KILL, USR1, SEGV, TERM)
    75 | 134 | 135 | 137 | 138 | 139 | 143)
        if ((${SLURM_RESTART_COUNT:-0} < ${MAX_REQUEUES:-100})); then
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "requeue.sh: requeued ${SLURM_RESTART_COUNT} times already; raise MAX_REQUEUES to allow more" >&2
        fi
        ;;
esac
exit "$status"
