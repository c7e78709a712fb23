#!/usr/bin/env bash
# Compares methods x SLC x IPC x students x seeds: runs what is missing, then table and plots.
#   bash scripts/run_sweep.sh --plan PLAN.yaml [--jobs N]
#   bash scripts/run_sweep.sh --dataset digits --data-dir 'D/ipc{ipc}' --val-dir V --out-dir O
#       --methods hard soft hald balanced --slc 5 10 --ipc 5 --students ConvNetW32
#       --relabel "--teacher ConvNetW32 --teacher-weights W" -- --temperature 4
#
#   --plan FILE           YAML with the settings below (data_dir for --data-dir); flags override it
#   --dataset NAME        as for validate/train.py; custom has --input-size S, --mean R G B,
#                         --std R G B and --num-classes N with it: once, for labels and runs
#   --data-dir DIR        distilled images; {ipc} stands for the IPC
#   --val-dir DIR         validation images
#   --out-dir DIR         gets runs, logs, results.csv, summary.csv, table.md, table.tex and plots
#   --label-dir DIR       label sets, {ipc} as above (default: labels/ipc{ipc} in --out-dir)
#   --methods NAME ...    hard, soft, hald, balanced, auto, reset, S1 to S8, joint, moved, static,
#                         lpld, lpqld, or a kind of extensions/. In a plan a method has flags of its
#                         own: {soft at T 4: {like: soft, flags: --temperature 4}}
#   --slc N ...           soft labels per class; or --labels-per-image N ...
#   --ipc N ...           distilled images per class
#   --students NAME ...   networks to train
#   --seeds N ...         of the students (default: 0 1 2)
#   --label-slc N         SLC of the label sets (default: the largest --slc, four times that where
#                         lpld and lpqld choose among more than they store)
#   --relabel "FLAGS"     of relabel/generate.py, for label sets to be made
#   --jobs N              runs side by side (default: one per visible GPU, one on a CPU)
#   --only WHAT           list the runs; or make only labels, only runs, or collect table and plots
#   --estimate            only say what it will take: runs, label sets, disk, time; that from the
#                         epochs measured so far, or from --images-per-second X ... (one number, or
#                         one for each student)
#   --task N              only run N of --only list, for job arrays
#   -- FLAGS              of validate/train.py, for every run; those of a method come after them
# Everything that can be checked is checked before the first run starts. A second plan with the same
# --out-dir adds to its results. In paths, $Main_Data_Path and $val_dir are those of config.sh or
# of the environment. docs/analysis.md says how to write plans and read tables.
# With SLURM, one run per task of a job array: scripts/sweep_slurm.sh
set -euo pipefail

source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
explain "$@"
read_config Main_Data_Path="" val_dir=""
for path in Main_Data_Path val_dir; do
    if [[ -n "${!path}" ]]; then export "${path?}"; else unset "$path"; fi
done
use_environment requirements.txt
exec "$PYTHON" "$ROOT/analysis/sweep.py" "$@"
