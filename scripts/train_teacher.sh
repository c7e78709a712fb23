#!/usr/bin/env bash
# Trains a teacher on a whole training set, and puts it where the other scripts look for it.
#   bash scripts/train_teacher.sh DATASET [TRAIN VAL] [-- FLAG ...]
#   bash scripts/train_teacher.sh custom TRAIN VAL -- --input-size 64 --mean R G B --std R G B
# TRAIN and VAL hold a folder of images per class; default: $Main_Data_Path/<dataset>/train and
# $val_dir/<dataset>. The network is TEACHER of config.sh or of the environment (ResNet18).
# The usual recipe: random crops and flips, no mixing, no smoothing; SGD with momentum 0.9, weight
# decay 0.0005, batches of 128, a cosine from 0.1 to 0 over 200 epochs (imagenet1k: 90). FLAGs of
# validate/train.py win over it: -- --lr 0.02 --schedule hard:60
# May be stopped and repeated. Ends with $Main_Data_Path/<dataset>/<TEACHER>.pth.
. "$(dirname "$(readlink -f "$0")")/pipeline.sh"

words=()
while [[ $# -gt 0 && "$1" != -- ]]; do
    words+=("$1")
    shift
done
shift || true # the --
[[ ${#words[@]} == [13] && "${words[0]}" != -* ]] ||
    fail "train_teacher.sh: takes DATASET [TRAIN VAL] [-- FLAG ...] (--help explains them)"
[[ -n "$Main_Data_Path" ]] ||
    fail "config.sh: set Main_Data_Path, where the teacher goes, in $ROOT/config.sh or in the" \
        "environment"
use_environment requirements.txt
dataset="$(cd "$ROOT" && "$PYTHON" -c 'import sys; from utils.data import datasets
print(datasets.canonical(sys.argv[1]))' "${words[0]}")"
refuse_own "$dataset" "$@"
home="$(folder_of "$Main_Data_Path" "$dataset")"
run="$Main_Data_Path/runs/$dataset/teacher_${TEACHER//[:\/]/-}_seed$SEED$(flags_name "$@")"
weights="$home/$TEACHER.pth"
[[ ! -e "$weights" ]] || cmp -s "$weights" "$run/checkpoint.pt" ||
    fail "train_teacher.sh: $weights is there already and is left as it is; move it away first"
[[ -n "$val_dir" || ${#words[@]} == 3 ]] ||
    fail "config.sh: set val_dir, the validation images, or give TRAIN VAL (--help)"
length=200
[[ "$dataset" != imagenet1k ]] || length=90
in_processes "$TRAIN_GPUS" "$ROOT/validate/train.py" --data-dir "${words[1]:-$home/train}" \
    --val-dir "${words[2]:-$(folder_of "$val_dir" "$dataset")}" --output-dir "$run" \
    --dataset "$dataset" --model "$TEACHER" --schedule "hard:$length" --hard-mix none \
    --label-smoothing 0 --optimizer sgd --lr 0.1 --eta 1 --weight-decay 0.0005 --batch-size 128 \
    --seed "$SEED" --workers "$WORKERS" "$@"
mkdir -p "$home"
cp "$run/checkpoint.pt" "$weights.partial"
mv "$weights.partial" "$weights"
echo "teacher: $weights"
