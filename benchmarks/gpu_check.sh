#!/usr/bin/env bash
# Everything that needs a GPU, in less than nine minutes: speed at 224 pixels with ResNet-18, the
# agreement of fast and plain paths, the GPU tests, and the demo. Uses the machine's own python3
# (or $PYTHON) and installs nothing. Results: runs/gpu_check/gpu_check.txt, and beside it a CSV of
# every timing and of every comparison.
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
common=(--compile)
speed=(--classes 100 --passes 5)
if [[ -n "${GPU_CHECK_SMALL:-}" ]]; then
    common=(--model ConvNetW32 --size 32 --batch-size 4 --classes 4)
    speed=(--ipc 2 --repeats 1 --workers 1)
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
rm -f "$out"/{steps,demo,gpu_check}.txt "$out"/{speed,agreement}.*
failed=0

note() { # NAME RESULT SECONDS
    printf '%-12s%-24s%5s s\n' "$@" >> "$out/steps.txt"
}

step() { # NAME LIMIT COMMAND ...: runs it for at most so long, its output into NAME.log
    local name="$1" most="$2" started=$SECONDS result="ok" status=0
    local left=$((limit > SECONDS ? limit - SECONDS : 1))
    most=$((most < left ? most : left))
    shift 2
    echo "== $name (until $((SECONDS + most)) s of $limit s)"
    timeout --kill-after=5 "$most" "$@" > "$out/$name.log" 2>&1 || status=$?
    if ((status != 0)); then
        failed=1
        result="failed ($status)"
        ((status != 124 && status != 137)) || result="out of time"
        tail -n 5 "$out/$name.log"
    fi
    note "$name" "$result" "$((SECONDS - started))"
}

step speed 300 "$python" benchmarks/speed.py --out "$out/speed" "${common[@]}" "${speed[@]}"
step agreement 150 "$python" benchmarks/gpu_check.py --out "$out" "${common[@]}"
if "$python" -c "import pytest" 2> /dev/null; then
    step tests 120 "$python" -m pytest -m gpu -rs
else
    note tests "skipped: no pytest" 0
fi
if [[ -n "${GPU_CHECK_SMALL:-}" ]]; then
    note demo "skipped: in miniature" 0
elif reason="$("$python" scripts/check_requirements.py requirements.txt 2>&1)"; then
    # The demo takes the python3 that comes first.
    step demo 300 env PATH="$(dirname "$(command -v "$python")"):$PATH" DEMO_DIR="$out/demo" \
        bash scripts/run_demo.sh
    grep -A 5 '^student  ' "$out/demo.log" > "$out/demo.txt" || true
else
    note demo "skipped: $reason" 0
fi
for part in steps.txt agreement.log speed.txt demo.txt; do
    if [[ -s "$out/$part" ]]; then
        printf '\n== %s\n' "$part"
        cat "$out/$part"
    fi
done | tee "$out/gpu_check.txt"
exit "$failed"
