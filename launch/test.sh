#!/usr/bin/env bash
# Lints, checks types and runs the tests.
# usage: bash launch/test.sh [--dry-run] [--all] [PYTEST_ARGUMENT ...]
#   --all adds the tests marked slow
set -euo pipefail
cd "$(dirname "$0")/.."

run() { "$@"; }
dry=()
if [ "${1:-}" = --dry-run ]; then
  run() { echo "+ $*"; }
  dry=(--dry-run)
  shift
fi
marked=(-m 'not slow')
if [ "${1:-}" = --all ]; then
  marked=()
  shift
fi

bash launch/venv.sh "${dry[@]}" test
export JAX_PLATFORMS=cpu
run .venv/bin/python -m ruff check .
run .venv/bin/python -m mypy
# A file's tests share what they compiled, so a file stays in one process; four
# of them hold about 10 GiB.
cores=$(nproc)
run .venv/bin/python -m pytest -q -n $((cores < 4 ? cores : 4)) \
  --dist loadfile "${marked[@]}" "$@"
