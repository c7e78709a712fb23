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

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
explain "$@"
cd "$ROOT"
python="${PYTHON:-python3}"
out="$ROOT/runs/gpu_check"
limit=530
network=()
images=(--classes 100 --seconds 1 --repeats 3 --val-images 50000)
workers=(4 16)
if [[ -n "${GPU_CHECK_SMALL:-}" ]]; then
    network=(--model ConvNetW32 --size 32 --batch-size 4 --classes 4)
    images=(--ipc 2 --seconds 0.1 --repeats 1 --val-images 40)
    workers=(0 1)
fi

if ! "$python" -c "import torch" 2> /dev/null; then
    echo "gpu_check: $python has no torch; activate the environment that has it, or name its Python:" \
        "PYTHON=.venv/bin/python bash benchmarks/gpu_check.sh" >&2
    exit 2
fi
gpu=yes
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    gpu=""
fi
if [[ -z "${GPU_CHECK_SMALL:-}" && -z "$gpu" ]]; then
    echo "gpu_check: no CUDA device here; GPU_CHECK_SMALL=1 tries the steps in miniature" >&2
    exit 2
fi

if (($# == 0)); then
    rm -rf "$out"
fi
mkdir -p "$out"
report="$out/gpu_check.txt"
asked=("$@")
failed=0

wanted() { # NAME: whether the step is to be made
    ((${#asked[@]} == 0)) || [[ " ${asked[*]} " == *" $1 "* ]]
}

note() { # NAME RESULT SECONDS: a line of the report, and below it what the step found
    printf '== %-20s%-24s%5s s\n' "$@" | tee -a "$report"
    local results="$out/$1.log"
    if [[ -s "$out/$1.txt" ]]; then
        results="$out/$1.txt"
    fi
    if [[ -s "$results" ]]; then
        tail -n 40 "$results" >> "$report"
    fi
}

step() { # NAME LIMIT COMMAND ...: runs it for at most so long, its output into NAME.log
    local name="$1" most="$2" started=$SECONDS result="ok" status=0
    local left=$((limit > SECONDS ? limit - SECONDS : 1))
    most=$((most < left ? most : left))
    shift 2
    wanted "$name" || return 0
    timeout --kill-after=5 "$most" "$@" > "$out/$name.log" 2>&1 || status=$?
    if ((status != 0)); then
        failed=1
        result="failed ($status)"
        ((status != 124 && status != 137)) || result="out of time"
    fi
    note "$name" "$result" "$((SECONDS - started))"
}

check() { # NAME LIMIT [FLAG ...]: a check of gpu_check.py
    local name="$1" most="$2"
    shift 2
    step "$name" "$most" "$python" benchmarks/gpu_check.py --out "$out" --checks "$name" \
        "${network[@]}" "$@"
}

skip() { # NAME REASON: a step that is not made
    if wanted "$1"; then
        note "$1" "$2" 0
    fi
}

speed() { # NAME LIMIT FLAG ...: a table of speed.py
    local name="$1" most="$2"
    shift 2
    step "$name" "$most" "$python" benchmarks/speed.py --out "$out/$name" "${network[@]}" "$@"
}

df -h /dev/shm > "$out/shared_memory.log" 2>&1 || true
skip shared_memory "of /dev/shm"
check pipeline 150
check views 40
check labels 40
check training 60
if [[ -n "$gpu" ]]; then
    check launches 40
else
    skip launches "needs a GPU"
fi
speed "speed_${workers[1]}" 140 "${images[@]}" --stages train evaluate --workers "${workers[1]}"
speed "train_${workers[0]}" 70 "${images[@]}" --stages train --workers "${workers[0]}" \
    --pipelines straightforward
speed relabel_fp16 70 "${images[@]}" --stages relabel --workers "${workers[1]}"
if "$python" -c "import pcodec" 2> /dev/null; then
    speed relabel_klt 60 "${images[@]}" --stages relabel --codec klt --pipelines ours
else
    skip relabel_klt "skipped: no pcodec"
fi
if [[ -n "${GPU_CHECK_SMALL:-}" ]]; then
    skip demo "not in miniature"
elif reason="$("$python" scripts/check_requirements.py requirements.txt 2>&1)"; then
    # The demo takes the python3 that comes first.
    step demo 150 env PATH="$(dirname "$(command -v "$python")"):$PATH" DEMO_DIR="$out/demo" \
        bash scripts/run_demo.sh
else
    skip demo "skipped: $reason"
fi
if [[ -z "$gpu" ]]; then
    skip tests "needs a GPU"
elif "$python" -c "import pytest" 2> /dev/null; then
    step tests 100 "$python" -m pytest -m gpu -rs
else
    skip tests "skipped: no pytest"
fi
if [[ -n "$gpu" ]]; then
    speed compiled_speed 150 "${images[@]}" --stages train --pipelines ours compiled
    check compiled 120
else
    skip compiled "needs a GPU"
fi
exit "$failed"
