# shellcheck shell=bash
# Sourced by run_imagenet.sh and its siblings: checks the paths, relabels, trains a student.

if [ -z "${BASH_VERSION:-}" ] || [ -o posix ]; then # started by sh
    exec env -u POSIXLY_CORRECT -u SHELLOPTS bash "$0" "$@"
fi
set -euo pipefail

source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
explain "$@"

# config.sh may set as little as the two paths.
read_config Main_Data_Path="" val_dir="" METHOD=fadrm IPC=10 SLC=150 BATCH_SIZE=16 CODEC=klt \
    TEACHER=ResNet18 TEACHER_WEIGHTS="" MODEL=ResNet18 RECIPE=published SCHEDULE="" \
    SOFT_EPOCHS="" HARD_EPOCHS="" SEED=0 WORKERS=4 GPUS=all TRAIN_GPUS=1 RELABEL_FLAGS="" RUN_NAME=""
export Main_Data_Path val_dir
[[ "$GPUS" =~ ^(all|[1-9][0-9]*)$ && "$TRAIN_GPUS" =~ ^[1-9][0-9]*$ ]] ||
    fail "GPUS=$GPUS, TRAIN_GPUS=$TRAIN_GPUS: must be numbers from 1 on; GPUS may be all"
[[ "$RECIPE" =~ ^(published|auto)$ ]] || fail "RECIPE=$RECIPE: must be published or auto"

DOWNLOADS="https://drive.google.com/drive/folders"

folder_of() { # PARENT DATASET: its folder, which the published data may name otherwise
    local published="$1/${2/#imagenette/imagenet-nette}"
    if [[ -d "$published" && ! -d "$1/$2" ]]; then echo "$published"; else echo "$1/$2"; fi
}

flags_name() { # FLAG ...: those that decide the result, as the end of a folder's name
    sed -E 's/ --(device|workers|packers|val-cache|resume|wandb-project)[= ][^ ]+//g
        s/ --(compile|graph|no-graph|tensorboard|force)( |$)/\2/g; s/[^A-Za-z0-9.]+/-/g; s/-$//; s/^-/_/' <<< " $*"
}

refuse_own() { # DATASET FLAG ...: flags that would contradict what a script itself passes on
    local dataset="$1" instead
    while shift && [[ $# -gt 0 ]]; do
        case "$1 ${2:-} " in
            --data-dir[\ =]* | --val-dir[\ =]* | --label-dir[\ =]*)
                instead="its arguments and settings name folders" ;;
            --output-dir[\ =]*) instead="Main_Data_Path and RUN_NAME choose it" ;;
            --model[\ =]*) instead="set MODEL, of a teacher TEACHER" ;;
            --recipe[\ =]*) instead="set RECIPE, for both stages" ;;
            --dataset[\ =]"$dataset "*) continue ;;
            --dataset[\ =]*) instead="the script is for $dataset" ;;
            *) continue ;;
        esac
        fail "$(basename "$0"): $1 is the script's own: $instead"
    done
}

has_published_labels() { # FOLDER: whether it has files of a layout that relabel/published.py reads
    [[ -n "$(find "$1/" -maxdepth 1 \( -name sampler_indices_dict.pt -o -name 'epoch_*' \
        -o -name 'batch_*.tar' \) -print -quit 2> /dev/null)" ]]
}

check_paths() { # DATASET IMAGES VALIDATION LABELS: one line for each thing that is missing
    local dataset="$1" images="$2" validation="$3" labels="$4" setting sort weights complete=yes
    missing() {
        echo "$*" >&2
        complete=""
    }
    [[ -n "$Main_Data_Path" && -n "$val_dir" ]] ||
        fail "config.sh: set Main_Data_Path (images, labels, runs) and val_dir (validation images) in" \
            "$ROOT/config.sh or in the environment; to see everything work without any data, run: bash" \
            "scripts/run_demo.sh"
    for setting in Main_Data_Path val_dir; do
        [[ -d "${!setting}" ]] ||
            fail "$setting=${!setting}, in config.sh or the environment, is no folder"
    done
    [[ -d "$images" ]] ||
        missing "no distilled images at $images: download them from" \
            "$DOWNLOADS/1H99ui_LZxyNYfaAEfDVX7rvobP3J-Lwp or select some (METHOD=rded) with: python" \
            "scripts/prepare_distilled.py --help; METHOD=$METHOD and IPC=$IPC choose the folder"
    case "$dataset" in
        cifar*) sort="make them (val/) with: python scripts/prepare_torchvision.py --help" ;;
        imagenette | imagewoof) sort="link val/ of the data set's own archive there" ;;
        *) sort="sort your own with: python scripts/prepare_val.py --help" ;;
    esac
    [[ -n "$(find -L "$validation/" -mindepth 1 -maxdepth 1 -type d -print -quit 2> /dev/null)" ]] ||
        missing "no class folders of validation images in $validation: download them from" \
            "$DOWNLOADS/1BCWWdvo1MnwtTUIEK-t3QcS0KwwAMVqH or $sort"
    weights="$(folder_of "$Main_Data_Path" "$dataset")/$TEACHER.pth"
    [[ -z "$TEACHER_WEIGHTS" || -f "$TEACHER_WEIGHTS" ]] ||
        missing "no teacher weights at TEACHER_WEIGHTS=$TEACHER_WEIGHTS"
    if [[ -z "$TEACHER_WEIGHTS" && "$dataset" != imagenet1k && "$TEACHER" != *:* && ! -f "$weights" &&
        ! -f "$Main_Data_Path/$TEACHER.pth" ]] && ! has_published_labels "$labels"; then
        missing "no teacher weights at $weights: put a $TEACHER trained on $dataset there, train one" \
            "with: bash scripts/train_teacher.sh $dataset, or name a file with TEACHER_WEIGHTS"
    fi
    [[ -n "$complete" ]] || exit 2
}

in_processes() { # N FILE [FLAG ...]: runs an entry script, with torchrun when N is above 1
    local count="$1" child status=0 launcher=()
    shift
    [[ "$count" -le 1 ]] ||
        launcher=("$ROOT/scripts/launch.py" --standalone "--nproc_per_node=$count")
    # Beside the shell, which passes a scheduler's signal on and waits for the step under way.
    "$PYTHON" "${launcher[@]}" "$@" &
    child=$!
    trap 'kill -TERM "$child" 2> /dev/null' HUP INT TERM USR1
    while kill -0 "$child" 2> /dev/null; do
        status=0
        wait "$child" || status=$?
    done
    trap - HUP INT TERM USR1
    return "$status"
}

run_pipeline() { # DATASET [-- FLAG ...]: the flags go to validate/train.py
    local dataset="$1" images labels validation run kind="" phases flags
    shift
    [[ $# == 0 || "$1" == -- ]] ||
        fail "unexpected argument $1: settings come from config.sh or the environment (IPC=50 bash" \
            "...), flags for validate/train.py follow --"
    shift || true # the --
    local name="${METHOD}_bs${BATCH_SIZE}_slc${SLC}_ipc${IPC}"
    images="$(folder_of "$Main_Data_Path/generated_data/syn_data" "$dataset")/${METHOD}_ipc$IPC"
    labels="$(folder_of "$Main_Data_Path/generated_data/new_labels" "$dataset")/$name"
    validation="$(folder_of "$val_dir" "$dataset")"
    read -ra flags <<< "$RELABEL_FLAGS"
    refuse_own "$dataset" "${flags[@]}" "$@"
    [[ "$SCHEDULE" != *:* || -z "$SOFT_EPOCHS$HARD_EPOCHS" ]] ||
        fail "SCHEDULE=$SCHEDULE names its epochs itself: unset SOFT_EPOCHS and HARD_EPOCHS, also in" \
            "config.sh"
    check_paths "$dataset" "$images" "$validation" "$labels"
    use_environment requirements.txt
    if has_published_labels "$labels"; then
        kind=_imported
        echo "== 1/2 labels: importing the published ones in $labels"
        "$PYTHON" "$ROOT/relabel/convert.py" --fkd-dir "$labels" --data-dir "$images" \
            --out-dir "$labels$kind" --dataset "$dataset"
    else
        [[ "$CODEC" == fp16 ]] || kind="_$CODEC"
        [[ "$TEACHER" == ResNet18 ]] || kind+="_${TEACHER//[:\/]/-}"
        [[ "$RECIPE" == published ]] || kind+="_$RECIPE"
        kind+="$(flags_name "${flags[@]}")"
        [[ -z "$TEACHER_WEIGHTS" ]] || flags=(--teacher-weights "$TEACHER_WEIGHTS" "${flags[@]}")
        [[ "$METHOD" != rded ]] || flags=(--no-bssl "${flags[@]}")
        [[ "$GPUS" != all ]] ||
            GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
        echo "== 1/2 labels: $labels$kind"
        mkdir -p "$(dirname "$labels")"
        in_processes "$GPUS" "$ROOT/relabel/generate.py" --data-dir "$images" \
            --label-dir "$labels$kind" --dataset "$dataset" --slc "$SLC" --batch-size "$BATCH_SIZE" \
            --codec "$CODEC" --recipe "$RECIPE" --workers "$WORKERS" --teacher "$TEACHER" "${flags[@]}"
    fi
    phases="${SCHEDULE:-hald}"
    [[ "$RECIPE" == published ]] || phases="$RECIPE${SCHEDULE:+-$SCHEDULE}"
    phases="${phases//[:,]/-}${SOFT_EPOCHS:+_soft$SOFT_EPOCHS}${HARD_EPOCHS:+_hard$HARD_EPOCHS}"
    [[ "$TRAIN_GPUS" == 1 ]] || phases+="_gpus$TRAIN_GPUS"
    run="$name${kind}_${MODEL//[:\/]/-}_${phases}_seed$SEED$(flags_name "$@")"
    run="$Main_Data_Path/runs/$dataset/${RUN_NAME:-$run}"
    echo "== 2/2 student: $run"
    mkdir -p "$(dirname "$run")"
    in_processes "$TRAIN_GPUS" "$ROOT/validate/train.py" --data-dir "$images" \
        --label-dir "$labels$kind" --val-dir "$validation" --output-dir "$run" --dataset "$dataset" \
        --model "$MODEL" --recipe "$RECIPE" ${SCHEDULE:+--schedule "$SCHEDULE"} \
        ${SOFT_EPOCHS:+--soft-epochs "$SOFT_EPOCHS"} ${HARD_EPOCHS:+--hard-epochs "$HARD_EPOCHS"} \
        --seed "$SEED" --workers "$WORKERS" "$@"
}
