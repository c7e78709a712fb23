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

"${train[@]}" --data-dir "$study/fashion_split/rest" --val-dir "$study/fashion_split/held_out" \
    --output-dir "$study/fashion_teacher" --dataset fashion_mnist --schedule hard:8 \
    --hard-mix none --label-smoothing 0 --min-scale 0.25 --batch-size 64 --lr 0.003 --eta 1 \
    --eval-every 2
"${train[@]}" --data-dir "$study/digits_split/rest" --val-dir "$study/digits_split/held_out" \
    --output-dir "$study/digits_teacher" --dataset digits --schedule hard:60 --hard-mix none \
    --label-smoothing 0 --min-scale 0.5 --lr 0.001 --eta 1 --eval-every 20

select_and_label() { # NAME DATASET IPC SLC IMAGES_PER_CLASS
    local teacher=(--teacher ConvNetW32 --teacher-weights "$study/${1%_random}_teacher/checkpoint.pt")
    if [[ ! -d "$study/$1_ipc$3" ]]; then
        "$PYTHON" scripts/prepare_distilled.py --data-dir "$study/${1%_random}_split/rest" \
            --out-dir "$study/$1_ipc$3" --dataset "$2" --ipc "$3" --crops 0 --candidates "$5" \
            "${teacher[@]}" --workers 0
    fi
    "$PYTHON" relabel/generate.py --data-dir "$study/$1_ipc$3" --label-dir "$study/$1_labels" \
        --dataset "$2" --slc "$4" --no-bssl "${teacher[@]}" --workers 0
}
select_and_label fashion fashion_mnist 10 50 300
select_and_label digits digits 5 25 5

plans=(fashion_tune fashion fashion_share digits_tune digits digits_share)
for plan in "${plans[@]}"; do
    "$PYTHON" analysis/sweep.py --plan "analysis/plans/$plan.yaml" --jobs 2
done
"$PYTHON" analysis/study.py --collect "${plans[@]}"
