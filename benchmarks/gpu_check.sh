#!/usr/bin/env bash
# Everything that needs a GPU, in less than nine minutes: speed at 224 pixels with ResNet-18, the
# agreement of fast and plain paths, the GPU tests, and the demo. Uses the machine's own python3
# (or $PYTHON) and installs nothing. Results: runs/gpu_check/gpu_check.json and gpu_check.txt.
#   bash benchmarks/gpu_check.sh
#   GPU_CHECK_SMALL=1 bash benchmarks/gpu_check.sh    the same steps in miniature, also on a CPU
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
python="${PYTHON:-python3}"
out="${GPU_CHECK_OUT:-$root/runs/gpu_check}"
limit="${GPU_CHECK_SECONDS:-530}"
common=(--device auto --compile)
speed=(--classes 100 --ipc 10 --passes 5 --repeats 5)
agreement=(--classes 100)
if [[ -n "${GPU_CHECK_SMALL:-}" ]]; then
    common=(--model ConvNetW32 --size 32 --batch-size 4 --device "${GPU_CHECK_DEVICE:-auto}")
    speed=(--classes 4 --ipc 2 --repeats 1 --workers 1)
    agreement=(--classes 4)
fi

if ! "$python" -c "import torch" 2> /dev/null; then
    echo "gpu_check: $python has no torch; activate the environment that has it, or name its Python:" \
        "PYTHON=.venv/bin/python bash benchmarks/gpu_check.sh" >&2
    exit 2
fi
if [[ -z "${GPU_CHECK_SMALL:-}" ]] &&
    ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu_check: no CUDA device here; GPU_CHECK_SMALL=1 tries the steps in miniature" >&2
    exit 2
fi

mkdir -p "$out"
rm -f "$out"/{steps.tsv,speed.*,agreement.json,demo.txt,gpu_check.*}

left() { # seconds that remain of the whole time, at least one
    echo $((limit > SECONDS ? limit - SECONDS : 1))
}

step() { # NAME LIMIT COMMAND ...: runs it for at most so long, its output into NAME.log
    local name="$1" most="$2" started=$SECONDS result="ok" status=0
    shift 2
    echo "== $name (until $((SECONDS + (most < $(left) ? most : $(left)))) s of $limit s)"
    timeout --kill-after=5 "$((most < $(left) ? most : $(left)))" "$@" > "$out/$name.log" 2>&1 ||
        status=$?
    if ((status == 124 || status == 137)); then
        result="out of time"
    elif ((status != 0)); then
        result="failed ($status)"
        tail -n 5 "$out/$name.log"
    fi
    printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - started))" >> "$out/steps.tsv"
}

skip() { # NAME REASON
    echo "== $1: skipped, $2"
    printf '%s\t%s\t0\n' "$1" "skipped: $2" >> "$out/steps.tsv"
}

step speed 300 "$python" benchmarks/speed.py --out "$out/speed" "${common[@]}" "${speed[@]}"
step agreement 150 "$python" benchmarks/gpu_check.py --out "$out" "${common[@]}" "${agreement[@]}"
if "$python" -c "import pytest" 2> /dev/null; then
    step tests 120 "$python" -m pytest -m gpu -rs
else
    skip tests "no pytest (requirements-dev.txt)"
fi
if [[ -n "${GPU_CHECK_SMALL:-}" ]]; then
    skip demo "in miniature"
elif "$python" scripts/check_requirements.py requirements.txt > "$out/requirements.log" 2>&1; then
    # The demo takes the python3 that comes first.
    step demo 300 env PATH="$(dirname "$(command -v "$python")"):$PATH" DEMO_DIR="$out/demo" \
        bash scripts/run_demo.sh
    grep -A 5 '^student  ' "$out/demo.log" > "$out/demo.txt" || true
else
    skip demo "$(tail -n 1 "$out/requirements.log")"
fi
"$python" benchmarks/gpu_check.py --out "$out" --summary
# shellcheck disable=SC2016 # awk's own variables
awk -F '\t' '$2 ~ /failed|out of time/ { bad = 1 } END { exit bad }' "$out/steps.tsv"
