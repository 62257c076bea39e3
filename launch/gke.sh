#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, through xpk: builds an image of the
# files that git tracks, starts `python -m recursive_tx train ARG ...` on every
# host as a workload and shows the log of the first. Kubernetes restarts the
# workload after a preemption, and the same command resumes.
# usage: bash launch/gke.sh [OPTION ...] -- ARG ...
#   --cluster=NAME    the cluster (recursive-tx)
#   --name=NAME       the workload (recursive-tx)
#   --type=TYPE       TPU type of a slice (v5litepod-16)
#   --slices=N        number of slices (1)
#   --zone=ZONE       (gcloud's compute/zone)
#   --project=ID      (gcloud's core/project)
#   --create          create the cluster first, or bring it to what is asked
#   --spot            with --create: cheaper, may be preempted
#   --reservation=R   with --create: take the TPUs from this reservation
#   --image=IMAGE     base image, with Python 3.11 or newer (python:3.11); one
#                     whose /app has a filled .venv saves installing per start
#   --restarts=N      of the workload, after preemptions and faults of a run
#                     that had lasted (50)
#   --quick=SECONDS   a failure of the command sooner than this is final (1800)
#   --poll=SECONDS    between looks at a workload without a log (15)
#   --keep            leave the workload when it has ended (the default)
#   --delete          delete it then; without ARG, delete it now
#   --delete-cluster  delete the cluster, with all that it runs, now
#   --dry-run         print the commands of a run without mishap, do nothing
# The workload outlives this script: started again it follows the log.
# --workdir must be in a bucket (gs://...): a pod's disk goes with it.
# xpk brings gcloud, kubectl and docker into it: `pip install xpk` and
# https://github.com/AI-Hypercomputer/xpk/blob/main/docs/installation.md.
# Exit status: 0 when the workload has finished.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.bash

cluster=recursive-tx name=recursive-tx type=v5litepod-16 slices=1 zone=''
project='' create='' spot='' reservation='' image=python:3.11 restarts=50
# shellcheck disable=SC2034  # `exclusive` reads keep.
keep='' delete='' delete_cluster=''
read_options 'cluster name type slices zone project reservation image restarts
  quick poll' 'create spot keep delete delete-cluster' "$@"
whole_numbers slices restarts quick poll
exclusive keep delete
exclusive spot reservation
[ -z "$spot$reservation" ] || [ "$create" ] ||
  die '--spot and --reservation choose a new cluster; add --create'

where=("--cluster=$cluster")
[ -z "$zone" ] || where+=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

# xpk asks before it overwrites; without an answer it does not.
on_cluster() { run xpk "$@" "${where[@]}" < /dev/null; }

create_cluster() {
  local capacity=--on-demand
  [ -z "$spot" ] || capacity=--spot
  [ -z "$reservation" ] || capacity=--reservation=$reservation
  on_cluster cluster create "--tpu-type=$type" "--num-slices=$slices" \
    "$capacity"
}

# `exec`, so that the pod's SIGTERM reaches the worker and not a shell between.
create_workload() {
  local command
  command=$(quote bash launch/worker.bash pod "$quick" "${train[@]}")
  # shellcheck disable=SC2016  # The inner shell expands these.
  run bash -c 'source launch/common.bash && mkdir -p "$0" && tracked_files |
    tar --null --files-from=- -cf - | tar -xf - -C "$0"' "$scratch" &&
    on_cluster workload create "--workload=$name" "--tpu-type=$type" \
      "--num-slices=$slices" "--base-docker-image=$image" \
      "--script-dir=$scratch" "--max-restarts=$restarts" \
      "--restart-on-exit-codes=$STOPPED" \
      --termination-grace-period-seconds=120 \
      "--command=exec $command"
}

# xpk's answer: 0 finished, 124 going on, 125 failed, else it does not know.
workload_status() {
  local words=(workload list "--wait-for-job-completion=$name" --timeout=0)
  if [ "$dry_run" ]; then
    on_cluster "${words[@]}"
  else
    on_cluster "${words[@]}" > "$scratch.log" 2>&1
  fi
}

# usage: follow FLAG; the first host of the first slice.
follow() {
  local jobset=jobset.sigs.k8s.io
  run kubectl logs --follow --all-containers --tail=-1 "$@" \
    "--selector=$jobset/jobset-name=$name,$jobset/job-index=0,$(
    )batch.kubernetes.io/job-completion-index=0"
}

# Shows the log, over restarts, until the workload has ended. Returns its end.
watch() {
  local status unknown=0 since=()
  while :; do
    follow "${since[@]}" || true
    SECONDS=0
    status=0
    workload_status || status=$?
    case $status in
      124) unknown=0 ;;
      0 | 125) return "$status" ;;
      *)
        unknown=$((unknown + 1))
        [ "$unknown" -lt "$failures" ] || return "$status"
        ;;
    esac
    sleep "$poll"
    # A restart makes new pods, whose log is all new.
    since=("--since=$((SECONDS + 2))s")
  done
}

delete_workload() {
  say "deleting workload $name of cluster $cluster"
  on_cluster workload delete "--workload=$name" --force
}

needs xpk 'pip install xpk brings it'
needs kubectl 'gcloud components install kubectl brings it'
if [ "$delete_cluster" ]; then
  say "deleting cluster $cluster"
  on_cluster cluster delete --force
  exit
fi
if [ "$delete" ] && [ ${#train[@]} = 0 ]; then
  delete_workload
  exit
fi
scratch=${TMPDIR:-/tmp}/recursive_tx
if [ -z "$dry_run" ]; then
  [ ${#train[@]} -gt 0 ] || die 'give the arguments of train after --'
  check_checkout
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch" "$scratch.log"' EXIT
fi
[ -z "$create" ] || create_cluster
if [ "$dry_run" ]; then
  workload_status
  create_workload
  follow
  workload_status
  [ -z "$delete" ] || delete_workload
  exit
fi

status=0
workload_status || status=$?
case $status in
  0) say "workload $name has already finished; another --name starts anew" ;;
  124) say "workload $name is already going on" ;;
  125) die "workload $name has failed; --delete it, or give another --name" ;;
  *) create_workload ;;
esac
if [ "$status" != 0 ]; then
  trap 'say "interrupted; workload $name goes on"; exit 130' INT TERM
  status=0
  watch || status=$?
  trap - INT TERM
fi
case $status in
  0) ;;
  125) say "workload $name failed; its log is above" ;;
  *) cat "$scratch.log" >&2 && die "cannot tell how workload $name is" ;;
esac
[ -z "$delete" ] || delete_workload
exit "$status"
