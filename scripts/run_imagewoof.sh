#!/usr/bin/env bash
# Relabels distilled imagewoof images and trains a student on them; settings: config.sh.
# Settings may be given like this, too: IPC=50 METHOD=rded bash scripts/run_imagewoof.sh
# Flags after -- go to validate/train.py: bash scripts/run_imagewoof.sh -- --soft-loss-scale T2

# shellcheck source=scripts/pipeline.sh
. "$(dirname "$(readlink -f "$0")")/pipeline.sh"
run_pipeline imagewoof "$@"
