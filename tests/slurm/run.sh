#!/usr/bin/env bash
# tests/slurm/run.sh [--install] [--quick] [FOLDER]
# The whole pipeline on a real Slurm, disturbed in every way (see pipeline.py).
# PYTHON names the interpreter that has karmma-pipeline installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
PYTHONPATH="$root:$root/tests" exec "${PYTHON:-python3}" -m slurm.pipeline "$@"
