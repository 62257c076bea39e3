#!/usr/bin/env bash
# Makes .venv, or reuses it, with the package and the extras named installed.
# usage: bash launch/venv.sh [--dry-run] [EXTRA ...]
set -euo pipefail
cd "$(dirname "$0")/.."

run() { "$@"; }
if [ "${1:-}" = --dry-run ]; then
  run() { echo "+ $*"; }
  shift
fi

extras=$(IFS=,; echo "$*")
# What was asked for, and what decides what is installed for it.
want="$(cat setup.py constraints.txt | cksum) ${extras:-none}"
stamp=".venv/installed-${extras:-none}"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi
python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is older than Python 3.11; set PYTHON to one that is not" >&2
    exit 1
  }
  run "$python" -m venv .venv
fi
run .venv/bin/python -m pip install --quiet --constraint constraints.txt \
  --editable ".${extras:+[$extras]}"
run eval "echo '$want' > '$stamp'"
