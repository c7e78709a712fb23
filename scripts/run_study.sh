#!/usr/bin/env bash
# Everything behind analysis/study.md: data, teachers, labels, sweeps, tables and plots.
#   bash scripts/run_study.sh [FOLDER WITH FASHION-MNIST'S FOUR IDX FILES]
# Without the folder torchvision downloads them (Debian has them too: dataset-fashion-mnist, in
# /usr/share/datasets/fashion-mnist). About two hours on two CPU cores; may be stopped and repeated.
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
use_environment requirements.txt
source_dir=()
[[ $# -eq 0 ]] || source_dir=(--source-dir "$(realpath "$1")")
cd "$ROOT"
study=runs/study
mkdir -p "$study"
export OMP_NUM_THREADS=1
train=("$PYTHON" validate/train.py --model ConvNetW32 --workers 0)

"$PYTHON" scripts/prepare_torchvision.py --dataset fashion_mnist --size 32 \
    --out-dir "$study/fashion_mnist" "${source_dir[@]}"
"$PYTHON" scripts/prepare_split.py --data-dir "$study/fashion_mnist/train" \
    --out-dir "$study/fashion_split" --held-out 300
"$PYTHON" scripts/prepare_digits.py --out-dir "$study/digits"
"$PYTHON" scripts/prepare_split.py --data-dir "$study/digits/train" \
    --out-dir "$study/digits_split" --held-out 30

teacher() { # NAME DATASET FLAG ...: trains runs/study/NAME_teacher on the images not held out
    local images="$study/${1%%_*}_split"
    "${train[@]}" --data-dir "$images/rest" --val-dir "$images/held_out" \
        --output-dir "$study/$1_teacher" --dataset "$2" --label-smoothing 0 --eta 1 "${@:3}"
}
fashion=(--batch-size 64 --lr 0.003 --eval-every 2)
teacher fashion fashion_mnist --schedule hard:8 --hard-mix none --min-scale 0.25 "${fashion[@]}"
teacher fashion_cutmix fashion_mnist --schedule hard:6 --hard-mix cutmix --min-scale 0.08 \
    "${fashion[@]}"
teacher digits digits --schedule hard:60 --hard-mix none --min-scale 0.5 --lr 0.001 --eval-every 20

distil() { # NAME DATASET IPC CANDIDATES: the images of each class that NAME_teacher is surest of
    [[ -d "$study/$1_ipc$3" ]] || "$PYTHON" scripts/prepare_distilled.py \
        --data-dir "$study/$1_split/rest" --out-dir "$study/$1_ipc$3" --dataset "$2" --ipc "$3" \
        --teacher ConvNetW32 --teacher-weights "$study/$1_teacher/checkpoint.pt" --crops 0 \
        --candidates "$4" --workers 0
}
distil fashion fashion_mnist 10 300
distil digits digits 5 5

label() { # IMAGES DATASET SLC TEACHER LABELS
    "$PYTHON" relabel/generate.py --data-dir "$study/$1" --label-dir "$study/$5" --dataset "$2" \
        --slc "$3" --teacher ConvNetW32 --teacher-weights "$study/$4/checkpoint.pt" --no-bssl \
        --workers 0
}
label fashion_ipc10 fashion_mnist 50 fashion_teacher fashion_plain_labels
label fashion_ipc10 fashion_mnist 50 fashion_cutmix_teacher fashion_labels
label digits_ipc5 digits 25 digits_teacher digits_labels

plans=(fashion_tune fashion fashion_share fashion_plain_tune digits_tune digits digits_share resnet18)
for plan in "${plans[@]}"; do
    "$PYTHON" analysis/sweep.py --plan "analysis/plans/$plan.yaml" --jobs 2
done
# For the figure of the stall: published at the T of the balanced run.
"${train[@]}" --data-dir "$study/digits_ipc5" --label-dir "$study/digits_labels" \
    --val-dir "$study/digits_split/held_out" --output-dir "$study/stall_published" \
    --dataset digits --slc 15 --temperature 20 --label-smoothing 0.1 --lr 0.001 --eta 2 \
    --eval-every 100
out=analysis/results
runs=$study/digits_runs/runs
"$PYTHON" analysis/updates.py --out "$out/updates" "published=$study/stall_published" \
    "soft loss x T²=$runs/balanced_slc15_ipc5_ConvNetW32_seed0" \
    "state reset=$runs/reset_slc15_ipc5_ConvNetW32_seed0"
"$PYTHON" analysis/gradients.py --run "$runs/balanced_slc15_ipc5_ConvNetW32_seed0" \
    --out "$out/gradients" --every 15
"$PYTHON" analysis/adam_eps.py --run "$study/resnet18/runs/published_slc15_ipc5_ResNet18_seed0" \
    --out "$out/adam_eps" --batches 2
"$PYTHON" analysis/study.py --collect "${plans[@]}"
