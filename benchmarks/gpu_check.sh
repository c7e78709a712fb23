#!/usr/bin/env bash
# Everything that needs a GPU, in less than nine minutes: both stages as a user runs them, agreement
# of fast and plain paths, speed at 224 pixels with ResNet-18, the demo, the GPU tests; what compiles
# comes last. Uses the machine's own python3 (or $PYTHON) and installs nothing. Each step's results
# are in runs/gpu_check when it is done, and all of them in gpu_check.txt there; what is stopped
# loses the step under way alone.
#   bash benchmarks/gpu_check.sh              all steps
#   bash benchmarks/gpu_check.sh demo tests   some of them again; the others' results stay
#   GPU_CHECK_SMALL=1 bash benchmarks/gpu_check.sh    the same steps in miniature, also on a CPU
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
explain "$@"
cd "$ROOT"
python="${PYTHON:-python3}"
small="${GPU_CHECK_SMALL:-}"
out="$ROOT/runs/gpu_check"
asked=" $* "
limit=530
failed=0
has() { "$python" -c "import $1" 2> /dev/null; }

network=()
images=(--classes 100 --seconds 1 --repeats 3 --val-images 50000)
few=4 many=16
if [[ -n "$small" ]]; then
    network=(--model ConvNetW32 --size 32 --batch-size 4 --classes 4)
    images=(--ipc 2 --seconds 0.1 --repeats 1 --val-images 40)
    few=0 many=1
fi
has torch ||
    fail "gpu_check: $python has no torch; activate the environment that has it, or name its Python:" \
        "PYTHON=.venv/bin/python bash benchmarks/gpu_check.sh"
# Why a step is not made, where it is not.
no_gpu="" no_codec="" no_demo="" no_tests=""
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || no_gpu="needs a GPU"
[[ -n "$small" || -z "$no_gpu" ]] ||
    fail "gpu_check: no CUDA device here; GPU_CHECK_SMALL=1 tries the steps in miniature"
has pcodec || no_codec="skipped: no pcodec"
has pytest || no_tests="skipped: no pytest"
if [[ -n "$small" ]]; then
    no_demo="not in miniature"
elif ! reason="$("$python" scripts/check_requirements.py requirements.txt 2>&1)"; then
    no_demo="skipped: $reason"
fi

step() { # NAME LIMIT REASON COMMAND ...: for LIMIT seconds at most, unless there is a REASON not to
    local name="$1" most="$2" result="$3" started=$SECONDS status=0 found
    local left=$((limit > SECONDS ? limit - SECONDS : 1))
    shift 3
    [[ "$asked" == "  " || "$asked" == *" $name "* ]] || return 0
    if [[ -z "$result" ]]; then
        timeout --kill-after=5 $((most < left ? most : left)) "$@" > "$out/$name.log" 2>&1 || status=$?
        case "$status" in
            0) result="ok" ;;
            124 | 137) result="out of time" ;;
            *) result="failed ($status)" ;;
        esac
        ((status == 0)) || failed=1
    fi
    printf '== %-20s%-24s%5s s\n' "$name" "$result" "$((SECONDS - started))" | tee -a "$out/gpu_check.txt"
    found="$out/$name.txt" # a table
    [[ -s "$found" ]] || found="$out/$name.log"
    [[ ! -s "$found" ]] || tail -n 40 "$found" >> "$out/gpu_check.txt"
}

check() { # NAME LIMIT REASON: a check of gpu_check.py
    step "$@" "$python" benchmarks/gpu_check.py --out "$out" --checks "$1" "${network[@]}"
}

speed() { # NAME LIMIT REASON FLAG ...: a table of speed.py
    step "${@:1:3}" "$python" benchmarks/speed.py --out "$out/$1" "${network[@]}" "${images[@]}" "${@:4}"
}

[[ "$asked" != "  " ]] || rm -rf "$out"
mkdir -p "$out"
step shared_memory 10 "" bash -c "df -h /dev/shm || true"
check pipeline 150 ""
check views 40 ""
check labels 40 ""
check training 60 ""
check launches 40 "$no_gpu"
speed "speed_$many" 140 "" --stages train evaluate --workers "$many"
speed "train_$few" 70 "" --stages train --workers "$few" --pipelines straightforward
speed relabel_fp16 70 "" --stages relabel --workers "$many"
speed relabel_klt 60 "$no_codec" --stages relabel --codec klt --pipelines ours
# The demo takes the python3 that comes first.
step demo 150 "$no_demo" env PATH="$(dirname "$(command -v "$python")"):$PATH" DEMO_DIR="$out/demo" \
    bash scripts/run_demo.sh
step tests 100 "${no_gpu:-$no_tests}" "$python" -m pytest -m gpu -rs
speed compiled_speed 150 "$no_gpu" --stages train --pipelines ours compiled
check compiled 120 "$no_gpu"
exit "$failed"
