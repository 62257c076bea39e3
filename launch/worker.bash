#!/usr/bin/env bash
# One host's part of launch/tpu_vm.sh and launch/gke.sh.
# usage, from the home directory of a TPU VM or from the checkout in a pod:
#   worker.bash install          unpacks ~/recursive_tx.tgz, fills its .venv
#   worker.bash start ARG ...    train ARG ... in the background; once
#   worker.bash follow LINES     its log, from LINES of `tail -n` on
#   worker.bash status           "worker status: running", or the exit status
#   worker.bash stop             SIGTERM, and SIGKILL after a minute and a half
#   worker.bash halt             the same, for good: "worker status: halted"
#   worker.bash pod SECONDS ARG ...  installs and trains in the foreground
# The command runs apart from any connection, for those break.
set -euo pipefail

state=~/recursive_tx.run
checkout=~/recursive_tx

alive() {
  # A number alone may since have become another process's.
  grep -qsa 'worker.bash' "/proc/$(cat "$state/pid" 2> /dev/null)/cmdline"
}

# An interpreter of the version that the pins were tested with, or near it.
# TPU VM images bring Python 3.10.
find_python() {
  local python
  for python in python3.11 python3.12 python3.13 python3; do
    if "$python" -c 'import ensurepip, sys, venv
sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$python"
      return
    fi
  done
  python3 -m pip install --quiet --user uv >&2
  python3 -m uv python install 3.11 >&2
  python3 -m uv python find 3.11
}

install_tpu() {
  PYTHON=$(find_python) bash launch/venv.sh tpu
}

install() {
  mkdir -p "$state" "$checkout"
  if alive; then
    echo "$(hostname): a command is running; its checkout is left as it is"
    return
  fi
  cd "$checkout"
  # What the last copy brought goes, lest a removed module linger; results
  # and .venv stay.
  if [ -f "$state/files" ]; then
    tr '\n' '\0' < "$state/files" | xargs -0 rm -f --
  fi
  tar -xzf ~/recursive_tx.tgz
  tar -tzf ~/recursive_tx.tgz > "$state/files"
  install_tpu
}

start() {
  umask 077
  local command
  command=$(printf '%q ' "$@")
  if alive; then
    if [ "$command" = "$(cat "$state/command")" ]; then
      echo "$(hostname): the same command is already running"
      return
    fi
    # As BUSY in common.bash, of which the copy here may be another.
    return 76
  fi
  echo "$command" > "$state/command"
  rm -f "$state/status" "$state/halted"
  setsid bash "$checkout/launch/worker.bash" background "$@" \
    > "$state/log" 2>&1 < /dev/null &
  echo $! > "$state/pid"
}

background() {
  local status=0
  cd "$checkout"
  # shellcheck source=launch/common.bash
  source launch/common.bash
  supervise .venv/bin/python -m recursive_tx train "$@" || status=$?
  echo "$status" > "$state/status.new"
  mv "$state/status.new" "$state/status"
}

status() {
  if alive; then
    echo 'worker status: running'
  elif [ -f "$state/halted" ]; then
    echo 'worker status: halted'
  elif [ -f "$state/status" ]; then
    echo "worker status: $(cat "$state/status")"
  else
    # Killed outright, or the host has restarted.
    echo 'worker status: 137'
  fi
}

follow() {
  tail -s 0.2 -n "$1" --follow=name --pid="$(cat "$state/pid")" "$state/log"
}

stop() {
  alive || return 0
  local pid
  pid=$(cat "$state/pid")
  kill -TERM "$pid"
  timeout 90 tail -s 0.2 --pid="$pid" -f /dev/null ||
    kill -KILL -- "-$pid" 2> /dev/null || true
}

halt() {
  touch "$state/halted"
  stop
}

# Kubernetes restarts a pod by its exit status alone: failing after having
# run for long is worth another try, failing at once is not.
pod() {
  # shellcheck source=launch/common.bash
  source launch/common.bash
  local status=0
  quick=$1
  shift
  supervise install_tpu || return $?
  SECONDS=0
  supervise .venv/bin/python -m recursive_tx train "$@" || status=$?
  if [ "$status" != 0 ] && [ "$SECONDS" -ge "$quick" ]; then
    status=$STOPPED
  fi
  return "$status"
}

case ${1:-} in
  install | start | background | follow | status | stop | halt | pod) "$@" ;;
  *) echo "worker.bash: no verb '${1:-}'" >&2 && exit 2 ;;
esac
