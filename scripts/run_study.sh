#!/usr/bin/env bash
# Everything behind analysis/study.md: data, teachers, labels, sweeps, tables and plots.
#   bash scripts/run_study.sh [FOLDER WITH FASHION-MNIST'S FOUR IDX FILES] [FOLDER WITH TYPEFACES]
#       [FOLDER WITH PHOTOGRAPHS]
# Without the first (or with "") torchvision downloads Fashion-MNIST; Debian has it too
# (dataset-fashion-mnist, in /usr/share/datasets/fashion-mnist). benchmarks/glyphs.py says how to
# get the typefaces, benchmarks/photos.py how to get the photographs; without them the parts on
# 200 characters and on photographs are left out. About four hours on two CPU cores; may be stopped
# and repeated.
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
explain "$@"
for folder in "$@"; do
    if [[ -n "$folder" && ! -d "$folder" ]]; then
        echo "run_study.sh: folder not found: $folder" >&2
        exit 2
    fi
done
use_environment requirements.txt
source_dir=()
[[ -z "${1:-}" ]] || source_dir=(--source-dir "$(realpath "$1")")
fonts="" photos=""
[[ -z "${2:-}" ]] || fonts="$(realpath "$2")"
[[ -z "${3:-}" ]] || photos="$(realpath "$3")"
cd "$ROOT"
study=runs/study
mkdir -p "$study"
export OMP_NUM_THREADS=1
train=("$PYTHON" validate/train.py --model ConvNetW32 --workers 0)

# The teacher beside is not to outlive this script.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

teacher() { # NAME IMAGES HELD_OUT FLAG ...: trains NAME_teacher; replaces the shell it runs in
    exec "${train[@]}" --data-dir "$study/$2" --val-dir "$study/$3" --output-dir "$study/$1_teacher" \
        --label-smoothing 0 --eta 1 "${@:4}"
}

distil() { # NAME TEACHER IMAGES IPC FLAG ...: the images of each class it is surest of
    [[ -d "$study/$1_ipc$4" ]] || "$PYTHON" scripts/prepare_distilled.py \
        --data-dir "$study/$3" --out-dir "$study/$1_ipc$4" --ipc "$4" --teacher ConvNetW32 \
        --teacher-weights "$study/$2_teacher/checkpoint.pt" --crops 0 --workers 0 "${@:5}"
}

label() { # IMAGES SLC TEACHER LABELS FLAG ...
    "$PYTHON" relabel/generate.py --data-dir "$study/$1" --slc "$2" --teacher ConvNetW32 \
        --teacher-weights "$study/$3_teacher/checkpoint.pt" --label-dir "$study/$4" --no-bssl \
        --workers 0 "${@:5}"
}

recipes() { # NAME IMAGES SLC TEACHER LABELS FLAG ...: label sets of --recipe auto, and of other views
    local views mix scale
    label "$2" "$3" "$4" "$5_auto" "${@:6}" --recipe auto
    for views in cutmix_0.08 cutmix_0.5 none_0.25 none_0.5 none_0.8 none_0.9 none_1; do
        mix="${views%_*}" scale="${views#*_}"
        label "$2" "$3" "$4" "$1_views_$views" "${@:6}" --mix "$mix" --min-scale "$scale"
    done
}

plans=()
sweep() { # PLAN ...: makes all runs of these plans of analysis/plans
    local plan
    for plan in "$@"; do
        "$PYTHON" analysis/sweep.py --plan "analysis/plans/$plan.yaml" --jobs 2
        plans+=("$plan")
    done
}

digits=(--dataset digits)
"$PYTHON" scripts/prepare_digits.py --out-dir "$study/digits"
"$PYTHON" scripts/prepare_split.py --data-dir "$study/digits/train" \
    --out-dir "$study/digits_split" --held-out 30
(teacher digits digits_split/rest digits_split/held_out "${digits[@]}" --schedule hard:60 \
    --hard-mix none --min-scale 0.5 --lr 0.001 --eval-every 20)
distil digits digits digits_split/rest 5 "${digits[@]}" --candidates 5
label digits_ipc5 50 digits digits_labels "${digits[@]}"
recipes digits digits_ipc5 50 digits digits_labels "${digits[@]}"
for batch in 10 50; do
    label digits_ipc5 15 digits "digits_labels_bs$batch" "${digits[@]}" --batch-size "$batch"
done
sweep digits_tune digits balance recipe_{views,scale,long}_digits recipe_digits

if [[ -n "$fonts" ]]; then
    glyphs=(--dataset custom --input-size 32 --mean 0.062 0.062 0.062 --std 0.219 0.219 0.219)
    [[ -d "$study/glyphs" ]] ||
        "$PYTHON" benchmarks/glyphs.py --fonts "$fonts" --out-dir "$study/glyphs"
    glyphs_teacher=(glyphs/train glyphs/val "${glyphs[@]}" --schedule hard:12 --min-scale 0.5
        --batch-size 64 --lr 0.002 --eval-every 4)
    teacher glyphs "${glyphs_teacher[@]}" --hard-mix none & # both, to see which knows the views
    (teacher glyphs_cutmix "${glyphs_teacher[@]}" --hard-mix cutmix)
    wait $!
    for ipc in 2 5; do distil glyphs glyphs_cutmix glyphs/train "$ipc" "${glyphs[@]}"; done
    glyphs+=(--batch-size 25)
    recipes glyphs glyphs_ipc2 20 glyphs_cutmix glyphs_labels_ipc2 "${glyphs[@]}"
    glyphs+=(--min-scale 0.5)
    label glyphs_ipc2 20 glyphs_cutmix glyphs_labels_ipc2 "${glyphs[@]}"
    label glyphs_ipc5 25 glyphs glyphs_plain_labels "${glyphs[@]}"
    label glyphs_ipc5 25 glyphs_cutmix glyphs_labels "${glyphs[@]}"
    sweep glyphs_tune glyphs glyphs_share recipe_{views,scale}_glyphs recipe_glyphs
else
    echo "run_study: no folder with typefaces was given: the 200 characters are left out"
fi

if [[ -n "$photos" ]]; then
    patches=(--dataset custom --input-size 32 --mean 0.45 0.45 0.45 --std 0.25 0.25 0.25)
    [[ -d "$study/photos" ]] ||
        "$PYTHON" benchmarks/photos.py --photos "$photos" --out-dir "$study/photos"
    (teacher photos photos/train photos/val "${patches[@]}" --schedule hard:40 --hard-mix cutmix \
        --batch-size 64 --lr 0.003 --eval-every 10)
    distil photos photos photos/train 5 "${patches[@]}"
    label photos_ipc5 50 photos photos_labels "${patches[@]}"
    recipes photos photos_ipc5 50 photos photos_labels "${patches[@]}"
    sweep recipe_photos_tune recipe_{views,scale,long}_photos recipe_photos
else
    echo "run_study: no folder with photographs was given: that part is left out"
fi

fashion=(--dataset fashion_mnist)
"$PYTHON" scripts/prepare_torchvision.py --dataset fashion_mnist --size 32 \
    --out-dir "$study/fashion_mnist" "${source_dir[@]}"
"$PYTHON" scripts/prepare_split.py --data-dir "$study/fashion_mnist/train" \
    --out-dir "$study/fashion_split" --held-out 300
teacher fashion fashion_split/rest fashion_split/held_out "${fashion[@]}" --schedule hard:8 \
    --hard-mix none --min-scale 0.25 --batch-size 64 --lr 0.003 --eval-every 2 &
(teacher fashion_cutmix fashion_split/rest fashion_split/held_out "${fashion[@]}" \
    --schedule hard:6 --hard-mix cutmix --min-scale 0.08 --batch-size 64 --lr 0.003 --eval-every 2)
wait $!
distil fashion fashion fashion_split/rest 10 "${fashion[@]}" --candidates 300
label fashion_ipc10 50 fashion fashion_plain_labels "${fashion[@]}"
label fashion_ipc10 100 fashion_cutmix fashion_labels "${fashion[@]}"
recipes fashion fashion_ipc10 100 fashion_cutmix fashion_labels "${fashion[@]}"
sweep fashion_tune fashion fashion_share recipe_{views,scale,long}_fashion recipe_fashion

sweep digits_share fashion_plain_tune resnet18 recipe_students
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
"$PYTHON" analysis/study.py --collect "${plans[@]}"
