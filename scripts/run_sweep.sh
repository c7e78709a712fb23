#!/usr/bin/env bash
# Compares methods x SLC x IPC x students x seeds: runs what is missing, then table and plots.
#   bash scripts/run_sweep.sh --plan PLAN.yaml [--jobs N]      --help lists the settings
# With SLURM, one run per task of a job array: scripts/sweep_slurm.sh
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
use_environment requirements.txt
exec "$PYTHON" "$ROOT/analysis/sweep.py" "$@"
