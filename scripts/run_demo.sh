#!/usr/bin/env bash
# The whole pipeline on scikit-learn's handwritten digits, in a few minutes on two CPU cores:
# teacher, distilled images, soft labels, five kinds of students with three seeds each, a table.
# Finished parts are skipped; the results are in runs/demo (or DEMO_DIR).
set -euo pipefail

source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
explain "$@"
use_environment requirements.txt
out="${DEMO_DIR:-$ROOT/runs/demo}"
mkdir -p "$out"

# Networks this small do not gain from a second thread; two runs side by side do.
export OMP_NUM_THREADS=1
common=(--val-dir "$out/digits/test" --dataset digits --model ConvNetW32 --lr 0.001 --workers 0
    --eval-every 20)
teacher=(--dataset digits --teacher ConvNetW32 --teacher-weights "$out/teacher/checkpoint.pt"
    --workers 0)

# Runs beside are not to outlive this script.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

student() { # NAME SEED [FLAG ...]
    "$PYTHON" "$ROOT/validate/train.py" --data-dir "$out/distilled_ipc5" \
        --label-dir "$out/labels_slc5" --output-dir "$out/$1_seed$2" --seed "$2" \
        --label-smoothing 0.1 --eta 2 "${common[@]}" "${@:3}"
}

beside() { # like student, in the background and without a bar
    TQDM_DISABLE=1 student "$@" > "$out/beside.log" 2>&1 &
}

finish_beside() { # waits for that one and shows what it printed
    local status=0
    wait $! || status=$?
    cat "$out/beside.log"
    return "$status"
}

echo "== 1/5 images: scikit-learn's digits, 899 to train, 898 to test"
"$PYTHON" "$ROOT/scripts/prepare_digits.py" --out-dir "$out/digits"
echo "== 2/5 teacher: trained on the whole training split"
"$PYTHON" "$ROOT/validate/train.py" --data-dir "$out/digits/train" --output-dir "$out/teacher" \
    --schedule hard:60 --hard-mix none --label-smoothing 0 --min-scale 0.5 --eta 1 "${common[@]}"
echo "== 3/5 distilled images: per class the five that the teacher is surest of"
"$PYTHON" "$ROOT/scripts/prepare_distilled.py" --data-dir "$out/digits/train" \
    --out-dir "$out/distilled_ipc5" --ipc 5 --crops 0 "${teacher[@]}"
echo "== 4/5 soft labels: one per image, of random crops, and of the views that --recipe auto takes"
for recipe in published auto; do
    labels="$out/labels_slc5"
    [[ "$recipe" == published ]] || labels+="_$recipe"
    "$PYTHON" "$ROOT/relabel/generate.py" --data-dir "$out/distilled_ipc5" --label-dir "$labels" \
        --slc 5 --codec "${CODEC:-klt}" --no-bssl --recipe "$recipe" "${teacher[@]}"
done
for seed in 0 1 2; do
    echo "== 5/5 students, seed $seed: hard only and soft only (300 epochs each)"
    beside soft "$seed" --schedule soft
    student hard "$seed" --schedule hard
    finish_beside
    echo "== 5/5 students, seed $seed: HALD as published and HALD balanced (150 soft + 150 hard)"
    beside hald_published "$seed"
    student hald_balanced "$seed" --soft-loss-scale T2
    finish_beside
done
echo "== 5/5 students, all seeds: --recipe auto"
auto=(--label-dir "$out/labels_slc5_auto" --recipe auto)
beside recipe_auto 0 "${auto[@]}"
student recipe_auto 1 "${auto[@]}"
finish_beside
student recipe_auto 2 "${auto[@]}"
echo
"$PYTHON" "$ROOT/analysis/compare.py" --out "$out/comparison.png" \
    "hard only=$out/hard_seed*" "soft only=$out/soft_seed*" \
    "HALD published=$out/hald_published_seed*" "HALD balanced (T2)=$out/hald_balanced_seed*" \
    "recipe auto=$out/recipe_auto_seed*"
