#!/usr/bin/env bash
# Check on a GPU what only a GPU can show, and record it in benchmarks/: at most nine minutes.
#
#     bash tools/gpu_check.sh [--out DIR] [--limit SECONDS] [--only NAME …]
#
# Settings are those of tools/gpu_check.py; --help lists them. PYTHON is the Python to use, by default that of .venv, or
# python3. No network is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONUNBUFFERED=1
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-4}" # rows compile side by side
exec "$PYTHON" tools/gpu_check.py "$@"
