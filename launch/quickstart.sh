#!/usr/bin/env bash
# From nothing to an uptrained relaxed recursive transformer, offline.
# usage: bash launch/quickstart.sh [--dry-run] [FLAG ...]
#   further flags go to `python -m recursive_tx compare`, such as
#   --config.optim.steps=200; --workdir=DIR resumes what DIR holds
set -euo pipefail
cd "$(dirname "$0")/.."

run() { "$@"; }
dry=()
if [ "${1:-}" = --dry-run ]; then
  run() { echo "+ $*"; }
  dry=(--dry-run)
  shift
fi

bash launch/venv.sh "${dry[@]}"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Large pages for large arrays: without them a fifth of a training step on CPU
# goes to page faults.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
run .venv/bin/python -m recursive_tx.demo.corpus --output=runs/text
run .venv/bin/python -m recursive_tx compare \
  --config=configs/quickstart.py \
  --workdir="runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
