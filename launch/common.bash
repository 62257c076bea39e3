# Sourced by the scripts that reach other machines and by what they run there:
# options, --dry-run, words that cross a shell unchanged, the bounded retry,
# and a command that knows whether it was told to stop.
# shellcheck shell=bash disable=SC2034  # Names are used where this is sourced.

# What a command that was stopped from outside exits with (EX_TEMPFAIL):
# training answers SIGTERM by saving and exiting 0, which is not the end.
readonly STOPPED=75
# What a host says that already runs something else.
readonly BUSY=76

dry_run=
poll=15
failures=3
quick=1800
failures_in_row=0

die() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

say() { echo "$(basename "$0" .sh): $*" >&2; }

# Prints the words as one line that any bash reads back as the same words.
quote() {
  local word quoted line=''
  for word; do
    printf -v quoted %q "$word"
    if [[ $quoted == "$'"* ]]; then
      # A word with newlines comes as $'...', where dollars stay bare.
      # Kubernetes replaces $(NAME) and $$ in commands: write them in octal.
      quoted=${quoted:2}
      quoted="\$'${quoted//\$/\\044}"
    fi
    line+=${line:+ }$quoted
  done
  printf '%s\n' "$line"
}

# Runs a command, or under --dry-run prints it.
run() {
  if [ "$dry_run" ]; then echo "+ $(quote "$@")"; else "$@"; fi
}

# Reads options up to -- into variables of their names (--dry-run sets
# dry_run), and the words after -- into the array train.
# usage: read_options 'VALUED ...' 'FLAG ...' "$@"
read_options() {
  local valued=" $1 " flags=" $2 dry-run help " word name value
  shift 2
  train=()
  while [ $# -gt 0 ]; do
    word=$1
    shift
    [ "$word" != -- ] || { train=("$@") && return; }
    [[ $word == --* ]] ||
      die "'$word' is not an option; arguments of train come after --"
    name=${word#--}
    name=${name%%=*}
    if [[ $valued == *" $name "* ]]; then
      if [[ $word == *=* ]]; then
        value=${word#*=}
      else
        [ $# -gt 0 ] || die "--$name needs a value"
        value=$1
        shift
      fi
      [ "$value" ] || die "--$name needs a value"
      printf -v "${name//-/_}" %s "$value"
    elif [[ $flags == *" $name "* ]]; then
      [ "$word" = "--$name" ] || die "--$name takes no value, got '$word'"
      [ "$name" != help ] || { usage && exit 0; }
      printf -v "${name//-/_}" 1
    else
      # shellcheck disable=SC2086  # The names are words.
      die "no option --$name; the nearest is" \
        "--$(nearest "$name" $valued $flags) (arguments of train come after --)"
    fi
  done
}

# The comment that a script opens with is its help.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

whole_numbers() {
  local name
  for name; do
    [[ ${!name} =~ ^[0-9]+$ ]] ||
      die "--$name must be a whole number, got '${!name}'"
  done
}

# Refuses two options together.
exclusive() {
  [ -z "${!1}" ] || [ -z "${!2}" ] || die "--$1 and --$2 exclude each other"
}

# The candidate at the smallest edit distance from a word.
nearest() {
  awk 'BEGIN {
    best = 1e9
    for (c = 2; c < ARGC; c++) {
      n = length(ARGV[1]); m = length(ARGV[c])
      for (j = 0; j <= m; j++) above[j] = j
      for (i = 1; i <= n; i++) {
        row[0] = i
        for (j = 1; j <= m; j++) {
          d = above[j - 1] + (substr(ARGV[1], i, 1) != substr(ARGV[c], j, 1))
          if (above[j] + 1 < d) d = above[j] + 1
          if (row[j - 1] + 1 < d) d = row[j - 1] + 1
          row[j] = d
        }
        for (j = 0; j <= m; j++) above[j] = row[j]
      }
      if (above[m] < best) { best = above[m]; answer = ARGV[c] }
    }
    print answer
  }' "$@"
}

needs() {
  command -v "$1" > /dev/null || [ "$dry_run" ] ||
    die "needs $1, which is not on PATH; $2"
}

# The files that git tracks, as they are now, with NULs between: never .git,
# .venv or what an ignored or untracked file may hold.
tracked_files() {
  local path
  git ls-files -z --cached | while IFS= read -r -d '' path; do
    if [ -e "$path" ] || [ -L "$path" ]; then printf '%s\0' "$path"; fi
  done
}

# Refuses what is no checkout, and names what will be missing elsewhere.
check_checkout() {
  git rev-parse --is-inside-work-tree > /dev/null 2>&1 ||
    die 'only files that git tracks are copied, and this is no git checkout'
  local left
  left=$(git ls-files --others --exclude-standard | paste -sd' ' -)
  [ -z "$left" ] || say "not copied, for git does not track them: $left"
}

# Counts a failure of the command itself, which exited with $1 after $2
# seconds. One that ran for --quick seconds starts the count anew; after
# --failures in a row that did not, gives up: what fails at once fails again.
count_failure() {
  if [ "$2" -lt "$quick" ]; then
    failures_in_row=$((failures_in_row + 1))
  else
    failures_in_row=0
  fi
  say "the command failed with exit status $1 after $2 s"
  [ "$failures_in_row" -lt "$failures" ] || return 1
}

# Runs a command, passes SIGTERM and SIGINT on to it as SIGTERM and waits for
# it to end. Returns its status, or $STOPPED after such a signal.
supervise() {
  local child='' status stopped=''
  trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM INT
  "$@" &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child" 2> /dev/null
  while :; do
    # A signal ends wait early, the command not.
    wait "$child" && status=0 || status=$?
    kill -0 "$child" 2> /dev/null || break
  done
  trap - TERM INT
  [ -z "$stopped" ] || return "$STOPPED"
  return "$status"
}
