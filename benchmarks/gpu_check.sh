#!/usr/bin/env bash
# Everything that needs a GPU, in less than nine minutes: both stages as a user runs them, agreement
# of fast and plain paths, speed at 224 pixels with ResNet-18, the demo, the GPU tests; what compiles
# comes last. Uses the machine's own python3 (or $PYTHON) and installs nothing. Each step's results
# are in runs/gpu_check when it is done, and all of them in gpu_check.txt there; what is stopped
# loses the step under way alone.
#   bash benchmarks/gpu_check.sh
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
images=(--classes 100 --passes 5 --repeats 3 --val-images 50000)
workers=(4 16)
if [[ -n "${GPU_CHECK_SMALL:-}" ]]; then
    network=(--model ConvNetW32 --size 32 --batch-size 4 --classes 4)
    images=(--ipc 2 --repeats 1 --val-images 40)
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

rm -rf "$out"
mkdir -p "$out"
report="$out/gpu_check.txt"
failed=0

note() { # NAME RESULT SECONDS: a line of the report, and below it what the step printed
    printf '== %-20s%-24s%5s s\n' "$@" | tee -a "$report"
    if [[ -s "$out/$1.log" ]]; then
        tail -n 40 "$out/$1.log" >> "$report"
    fi
}

step() { # NAME LIMIT COMMAND ...: runs it for at most so long, its output into NAME.log
    local name="$1" most="$2" started=$SECONDS result="ok" status=0
    local left=$((limit > SECONDS ? limit - SECONDS : 1))
    most=$((most < left ? most : left))
    shift 2
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

speed() { # NAME LIMIT FLAG ...: a table of speed.py
    local name="$1" most="$2"
    shift 2
    step "$name" "$most" "$python" benchmarks/speed.py --out "$out/$name" "${network[@]}" "$@"
}

check pipeline 150
check views 40
check labels 40
check training 60
if [[ -n "$gpu" ]]; then
    check launches 40
else
    note launches "needs a GPU" 0
fi
speed "speed_${workers[1]}" 110 "${images[@]}" --stages train evaluate --workers "${workers[1]}"
speed "train_${workers[0]}" 80 "${images[@]}" --stages train --workers "${workers[0]}"
for codec in fp16 klt; do
    speed "relabel_$codec" 80 "${images[@]}" --stages relabel --codec "$codec" --workers "${workers[1]}"
done
if [[ -n "${GPU_CHECK_SMALL:-}" ]]; then
    note demo "not in miniature" 0
elif reason="$("$python" scripts/check_requirements.py requirements.txt 2>&1)"; then
    # The demo takes the python3 that comes first.
    step demo 120 env PATH="$(dirname "$(command -v "$python")"):$PATH" DEMO_DIR="$out/demo" \
        bash scripts/run_demo.sh
else
    note demo "skipped: $reason" 0
fi
if [[ -z "$gpu" ]]; then
    note tests "needs a GPU" 0
elif "$python" -c "import pytest" 2> /dev/null; then
    step tests 120 "$python" -m pytest -m gpu -rs
else
    note tests "skipped: no pytest" 0
fi
if [[ -n "$gpu" ]]; then
    speed compiled_speed 120 "${images[@]}" --stages train --compile --workers "${workers[1]}"
    check compiled 120
else
    note compiled "needs a GPU" 0
fi
exit "$failed"
