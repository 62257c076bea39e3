#!/usr/bin/env bash
# Trains on a TPU VM or a whole pod slice, through gcloud: creates the TPU or
# reuses it, copies the files that git tracks, installs the pinned packages
# once per host, runs `python -m recursive_tx train ARG ...` on every worker
# and shows worker 0's log. A preempted TPU is created again and the same
# command resumes, until it exits with status 0.
# usage: bash launch/tpu_vm.sh [OPTION ...] -- ARG ...
#   --name=NAME       the TPU's name (recursive-tx)
#   --type=TYPE       accelerator type (v5litepod-16)
#   --version=V       runtime version (the one for the type)
#   --zone=ZONE       (gcloud's compute/zone)
#   --project=ID      (gcloud's core/project)
#   --spot            cheaper, may be preempted
#   --queued          wait in the queue, as a queued resource of that name
#   --failures=N      give up after N failures of the command in a row (3)
#   --quick=SECONDS   a run as long as this starts that count anew (1800)
#   --poll=SECONDS    between looks at a TPU that is not ready (15)
#   --keep            leave the TPU when the command has ended (the default)
#   --delete          delete it then; without ARG, delete it now
#   --stop            tell the command to save and end; the TPU stays
#   --dry-run         print the commands of a run without mishap, do nothing
# The command outlives this script: started again with the same words it
# follows the log, so an interrupt or a broken connection loses nothing.
# --workdir should be in a bucket (gs://...): a TPU VM's disk goes with it.
# For several workers gcloud needs `ssh-add ~/.ssh/google_compute_engine`.
# Exit status: 0 when the command has finished, 75 after --stop, its own after
# giving up.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.bash

name=recursive-tx type=v5litepod-16 version='' zone='' project=''
# shellcheck disable=SC2034  # `exclusive` reads keep.
spot='' queued='' keep='' delete='' stop=''
read_options 'name type version zone project failures quick poll' \
  'spot queued keep delete stop' "$@"
whole_numbers failures quick poll
exclusive keep delete

where=(--quiet)
[ -z "$zone" ] || where+=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

# Per https://cloud.google.com/tpu/docs/runtimes.
if [ -z "$version" ]; then
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    *) die "no runtime version is known for --type=$type; give --version" ;;
  esac
fi

tpus() { run gcloud compute tpus "$@" "${where[@]}"; }

# usage: describe GROUP FIELD; prints the field's value, or MISSING.
describe() {
  local answer words=("$1" describe "$name" "--format=value($2)")
  if [ "$dry_run" ]; then
    tpus "${words[@]}"
  elif answer=$(tpus "${words[@]}" 2> "$scratch/error"); then
    echo "${answer:-UNKNOWN}"
  elif grep -q NOT_FOUND "$scratch/error"; then
    echo MISSING
  else
    cat "$scratch/error" >&2
    return 1
  fi
}

tpu_state() {
  local state
  if [ "$dry_run" ]; then
    [ -z "$queued" ] || describe queued-resources state.state
    describe tpu-vm state
    return
  fi
  if [ "$queued" ]; then
    state=$(describe queued-resources state.state) || return 1
    if [ "$state" != ACTIVE ]; then
      echo "$state"
      return
    fi
  fi
  state=$(describe tpu-vm state) || return 1
  # A request whose TPU is gone cannot be filled again.
  if [ "$queued" ] && [ "$state" = MISSING ]; then state=SUSPENDED; fi
  echo "$state"
}

create() {
  local words=("$name" "--accelerator-type=$type")
  [ -z "$spot" ] || words+=(--spot)
  if [ "$queued" ]; then
    tpus queued-resources create "${words[@]}" "--runtime-version=$version" \
      "--node-id=$name"
  else
    tpus tpu-vm create "${words[@]}" "--version=$version"
  fi
}

# Deletes the TPU, by way of its queued resource where there is one.
delete_tpu() {
  local state=MISSING
  if [ "$dry_run" ]; then
    [ -z "$queued" ] || state=ACTIVE
  else
    state=$(describe queued-resources state.state) || return 1
  fi
  if [ "$state" != MISSING ]; then
    say "deleting queued resource $name and its TPU"
    tpus queued-resources delete "$name" --force
    return
  fi
  [ "$dry_run" ] || state=$(describe tpu-vm state) || return 1
  if [ -z "$dry_run" ] && [ "$state" = MISSING ]; then
    say "there is no TPU $name to delete"
    return
  fi
  say "deleting TPU $name"
  tpus tpu-vm delete "$name"
}

# Returns when the TPU is ready. What goes wrong before it ever was is
# somebody's to correct; later it is waited for, which costs nothing.
ready_before=
ensure_ready() {
  local state before='' requests=0
  while :; do
    state=$(tpu_state) || state=UNREACHABLE
    [ "$state" = "$before" ] || say "TPU $name is $state"
    before=$state
    case $state in
      READY) ready_before=1 && return ;;
      UNREACHABLE) [ "$ready_before" ] || exit 1 ;;
      MISSING)
        say "creating TPU $name ($type)"
        create && continue
        [ "$ready_before" ] || die "could not create $name; --queued waits"
        ;;
      STOPPED) tpus tpu-vm start "$name" && continue ;;
      FAILED)
        requests=$((requests + 1))
        [ "$requests" -lt "$failures" ] ||
          die "the request for $name failed $requests times; describe it"
        delete_tpu && continue
        ;;
      PREEMPTED | TERMINATED | SUSPENDED) delete_tpu && continue ;;
    esac
    sleep "$poll"
  done
}

# usage: on WORKERS VERB ARG ...
on() {
  local workers=$1
  shift
  tpus tpu-vm ssh "$name" "--worker=$workers" \
    "--command=bash recursive_tx/launch/worker.bash $(quote "$@")"
}

launch() {
  # shellcheck disable=SC2016  # The inner shells expand these.
  run bash -c 'source launch/common.bash && tracked_files |
    tar --null --files-from=- -czf "$0"' "$scratch/recursive_tx.tgz" &&
    tpus tpu-vm scp "$scratch/recursive_tx.tgz" "$name:recursive_tx.tgz" \
      --worker=all &&
    tpus tpu-vm ssh "$name" --worker=all --command='bash -c "$(tar -xOzf '\
'recursive_tx.tgz launch/worker.bash)" worker.bash install' &&
    on all start "${train[@]}"
}

# Shows the log until the command has ended everywhere. Prints to fd 3 its
# status (of the workers that did not finish, the first; halted after --stop),
# or LOST.
watch() {
  local state statuses ended='' seen=0
  : > "$scratch/log"
  while :; do
    # From where an earlier connection broke.
    on 0 follow "+$((seen + 1))" | tee -a "$scratch/log" || true
    [ -z "$ended" ] || break
    seen=$(wc -l < "$scratch/log")
    state=$(tpu_state) || state=UNREACHABLE
    case $state in
      READY)
        statuses=$(on all status |
          sed -n 's/^worker status: //p' | sort -u) || statuses=''
        # Once more for what was written since, and no connection brought.
        case $statuses in
          '' | *running*) ;;
          *) ended=1 && continue ;;
        esac
        ;;
      UNREACHABLE) ;;
      *) echo LOST >&3 && return ;;
    esac
    sleep "$poll"
  done
  grep -vx -m 1 0 <<< "$statuses" >&3 || echo 0 >&3
}

needs gcloud 'install the Google Cloud CLI'
scratch=${TMPDIR:-/tmp}
if [ -z "$dry_run" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi
if [ "$stop" ]; then
  on all halt
  exit
fi
if [ "$delete" ] && [ ${#train[@]} = 0 ]; then
  delete_tpu
  exit
fi
if [ "$dry_run" ]; then
  tpu_state
  create
  tpu_state
  launch
  on 0 follow +1
  on all status
  [ -z "$delete" ] || delete_tpu
  exit
fi

[ ${#train[@]} -gt 0 ] || die 'give the arguments of train after --'
check_checkout
case " ${train[*]}" in
  *' --workdir=gs://'* | *' --workdir gs://'*) ;;
  *) say 'the workdir is in no bucket: a preemption loses what it holds' ;;
esac
trap 'say "interrupted; TPU $name and its command go on"; exit 130' INT TERM
while :; do
  ensure_ready
  SECONDS=0
  status=0
  launch || status=$?
  [ "$status" != "$BUSY" ] ||
    die "TPU $name runs another command; --stop ends it"
  [ "$status" != 0 ] || { status=$(watch 3>&1 >&4); } 4>&1
  [ "$status" != 0 ] || break
  [ "$status" != LOST ] || continue
  if [ "$status" = halted ]; then
    say "TPU $name was told to stop; it is kept, and costs"
    exit "$STOPPED"
  fi
  # The end of the command may have come before the news of a preemption.
  [ "$(tpu_state)" = READY ] || continue
  on all stop || true
  count_failure "$status" "$SECONDS" || break
  sleep "$poll"
done
if [ "$status" != 0 ]; then
  say "gave up after $failures failures in a row, each within $quick s"
fi
if [ "$delete" ]; then
  delete_tpu
else
  say "TPU $name is kept, and costs; --delete removes it"
fi
exit "$status"
