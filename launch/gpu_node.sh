#!/usr/bin/env bash
# Trains on this host's GPUs, alone or as one of several hosts: installs the
# extra `gpu` in .venv, runs `python -m recursive_tx train ARG ...` and, when
# that fails, runs it again: the same command resumes.
# usage: bash launch/gpu_node.sh [OPTION ...] -- ARG ...
#   on every one of N hosts, I counting from 0:
#     bash launch/gpu_node.sh --coordinator=HOST0:8476 --processes=N \
#       --process=I -- ARG ...
#   under Slurm, whose environment says the same:
#     srun --nodes=N --ntasks-per-node=1 bash launch/gpu_node.sh -- ARG ...
#   --coordinator=HOST:PORT  where process 0 listens
#   --processes=N     number of hosts (1)
#   --process=I       this host's number
#   --failures=N      give up after N failures of the command in a row (3)
#   --quick=SECONDS   a run as long as this starts that count anew (1800)
#   --poll=SECONDS    before the command is run again (15)
#   --dry-run         print the commands, do nothing
# On SIGTERM, as before a preemption or from Ctrl-C, the command saves and ends.
# Exit status: 0 when the command has finished, 75 when it was told to stop,
# its own after giving up.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.bash

coordinator='' processes='' process=''
read_options 'coordinator processes process failures quick poll' '' "$@"
whole_numbers failures quick poll

# One process a host, of Slurm's making. Outside srun there is one host.
from_slurm() {
  processes=$SLURM_NTASKS
  process=$SLURM_PROCID
  [ "$processes" = "$SLURM_STEP_NUM_NODES" ] ||
    die "$processes tasks on $SLURM_STEP_NUM_NODES hosts;" \
      'give srun --ntasks-per-node=1'
  [ "$processes" -gt 1 ] || return 0
  local hosts
  needs scontrol 'it comes with Slurm'
  hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST")
  # A port of the job's own, for hosts may be shared.
  coordinator=${hosts%%$'\n'*}:$((SLURM_JOB_ID % 4096 + 61440))
}

given=$coordinator$processes$process
if [ -z "$given" ] && [ "${SLURM_STEP_NUM_NODES:-}" ]; then
  from_slurm
elif [ -z "$given" ] && [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
  die "the job has $SLURM_JOB_NUM_NODES hosts;" \
    'start this with srun --ntasks-per-node=1'
elif [ "$given" ]; then
  [ "$coordinator" ] && [ "$processes" ] && [ "$process" ] ||
    die '--coordinator, --processes and --process belong together'
  [[ $coordinator == *?:[0-9]* ]] ||
    die "--coordinator must be HOST:PORT, got '$coordinator'"
  whole_numbers processes process
  [ "$process" -lt "$processes" ] ||
    die "--process counts from 0 to $((processes - 1)), got $process"
fi

command=(.venv/bin/python -m recursive_tx train "${train[@]}")
if [ "$coordinator" ]; then
  command+=("--coordinator=$coordinator" "--processes=$processes"
    "--process=$process")
fi

# The hosts of a cluster often share the checkout: one installs at a time.
run flock launch/venv.sh bash launch/venv.sh gpu
if [ "$dry_run" ]; then
  run "${command[@]}"
  exit
fi
[ ${#train[@]} -gt 0 ] || die 'give the arguments of train after --'
while :; do
  SECONDS=0
  status=0
  supervise "${command[@]}" || status=$?
  case $status in
    0 | "$STOPPED") exit "$status" ;;
  esac
  count_failure "$status" "$SECONDS" || break
  sleep "$poll"
done
say "gave up after $failures failures in a row, each within $quick s"
exit "$status"
