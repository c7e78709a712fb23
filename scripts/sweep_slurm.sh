#!/usr/bin/env bash
# A sweep as a SLURM job array: each task does one line of the plan, on one GPU.
#   bash scripts/run_sweep.sh --plan PLAN.yaml --only labels     # once, before
#   bash scripts/run_sweep.sh --plan PLAN.yaml --only list       # counts the runs: 0 to N-1
#   sbatch --array=0-47 scripts/sweep_slurm.sh PLAN.yaml         # may be repeated: it continues
#   bash scripts/run_sweep.sh --plan PLAN.yaml --only collect    # table and plots

#SBATCH --job-name=hald-sweep
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --output=sweep_%A_%a.log
set -euo pipefail

# SLURM runs a copy of this file: the repository is where sbatch was called.
source "${SLURM_SUBMIT_DIR:-$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..}/scripts/setup.sh"
explain "$@"
[[ $# == 1 && -n "${SLURM_ARRAY_TASK_ID:-}" ]] ||
    fail "sweep_slurm.sh: takes a PLAN.yaml, as a task of a job array (--help shows how)"
cd "${SLURM_SUBMIT_DIR:-$PWD}"
exec bash "$ROOT/scripts/run_sweep.sh" --plan "$1" --only runs --task "$SLURM_ARRAY_TASK_ID"
