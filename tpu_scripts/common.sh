# shellcheck shell=bash
# What every script shares: strict mode, --help and --dry-run, checks of variables, and questions to all workers.
#
# Exit statuses of all scripts: 0 done; 1 something failed; 2 a mistake in arguments or variables; 3 refused, because
# the slice or the run is not in the state it takes; 4 a worker did not answer; status.sh and babysit.sh besides: 143
# the run was stopped.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: this is bash $BASH_VERSION; the scripts need 4.4 or newer" >&2
  exit 2
fi
set -euo pipefail
shopt -s inherit_errexit
# Commands of a dry run go to 3, also from inside $(...).
exec 3>&1

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$SCRIPTS")
DRY_RUN=${DRY_RUN:-0}

say() { printf '%s\n' "$*" >&2; }

# The ways to end: the message says what was given, what is allowed and what to do.
fail() { end 1 "$@"; }
mistake() { end 2 "$@"; }
refuse() { end 3 "$@"; }
unanswered() { end 4 "$@"; }

end() {
  say "error: ${*:2}"
  exit "$1"
}

# The help of a script is the comment at its head.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# Take --help and --dry-run out of the arguments; the others, and everything from -- on, stay in ARGS.
common_flags() {
  ARGS=()
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      --)
        ARGS+=("$@")
        break
        ;;
      *) ARGS+=("$1") ;;
    esac
    shift
  done
  export DRY_RUN
}

unknown_argument() { mistake "unknown argument '$1'; ${0##*/} --help lists what is allowed"; }

no_arguments() {
  if ((${#ARGS[@]})); then unknown_argument "${ARGS[0]}"; fi
}

# The command of a run from ARGS: everything after --.
take_command() {
  if ((${#ARGS[@]} == 0)) || [[ ${ARGS[0]} != -- ]]; then
    mistake "the command comes after --, and nothing but options before; for example: ${0##*/} -- jgrpo grpo CONFIG.py"
  fi
  COMMAND=("${ARGS[@]:1}")
  if ((${#COMMAND[@]} == 0)); then
    mistake "no command after --; for example: ${0##*/} -- jgrpo grpo CONFIG.py"
  fi
}

# check VARIABLE REGEX ALLOWED EXAMPLE: the whole value must match.
check() {
  local value=${!1-}
  if [[ $value =~ ^($2)$ ]]; then return; fi
  if [[ -z $value ]]; then mistake "$1 is not set; it takes $3: export $1=$4"; fi
  mistake "$1 is '$value'; allowed is $3: export $1=$4"
}

check_optional() {
  if [[ -n ${!1-} ]]; then check "$@"; fi
}

# check_whole VARIABLE EXAMPLE: a whole number without leading zeros, which bash would read as octal.
check_whole() { check "$1" '0|[1-9][0-9]{0,9}' "a whole number" "$2"; }

print_command() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }" >&3
}

# Run a command, or print it in a form that a shell reads.
run() {
  if [[ $DRY_RUN == 1 ]]; then print_command "$@"; else "$@"; fi
}

# The directory for what belongs to a slice on this machine: answers of workers, the archive of the source.
local_directory() {
  LOCAL_DIR=${LOCAL_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/jgrpo/$POD_NAME}
  if [[ $DRY_RUN != 1 ]]; then mkdir -p "$LOCAL_DIR"; fi
}

# Variables that all scripts with a slice need.
check_slice() {
  REMOTE_DIR=${REMOTE_DIR:-jgrpo}
  POLL_SECONDS=${POLL_SECONDS:-30}
  check REMOTE_DIR '[A-Za-z0-9_][A-Za-z0-9_.-]*' "a directory name in the home of the workers" jgrpo
  check POLL_SECONDS '[0-9]+([.][0-9]+)?' "a number of seconds" 30
  provision_check
  local_directory
}

# Stop unless the slice is there for use.
require_ready() {
  local state detail answer
  answer=$(provision_state ready)
  read -r state detail <<<"$answer"
  if [[ $state != ready ]]; then
    refuse "$POD_NAME is $state ($detail), not ready; create.sh creates it and waits, status.sh says more"
  fi
}

# Make ARCHIVE of the working tree: what git tracks and what it does not ignore, without the patterns in EXCLUDE.
make_archive() {
  local list=$1.files patterns file
  read -ra patterns <<<"${EXCLUDE:-}"
  local listing=(git -C "$ROOT" ls-files -z --cached --others --exclude-standard --deduplicate
    -- . "${patterns[@]/#/:(exclude)}")
  local archiving=(tar -C "$ROOT" -czf "$1" --null -T "$list")
  if [[ $DRY_RUN == 1 ]]; then
    print_command "${listing[@]}"
    print_command "${archiving[@]}"
    return
  fi
  "${listing[@]}" | while IFS= read -r -d '' file; do
    if [[ -e $ROOT/$file || -L $ROOT/$file ]]; then printf '%s\0' "$file"; fi
  done >"$list"
  "${archiving[@]}"
}

# on_all COMMAND...: worker.sh COMMAND on every worker at once. ANSWERS/N.log is what worker N wrote; it ends in
# "answer STATUS" if the worker was reached at all.
on_all() {
  ask_all "$(worker_command "$@")"
}

# The command line that runs worker.sh on a worker, or says that it is not there.
worker_command() {
  local line
  printf -v line '%q ' bash worker.sh "$@"
  printf '%s' "cd $REMOTE_DIR/source/tpu_scripts && exec ${line% }; echo state none, give setup.sh; echo answer 3"
}

ask_all() {
  ANSWERS=$LOCAL_DIR/answers
  if [[ $DRY_RUN != 1 ]]; then
    # Of this process alone: one may look at a run while another babysits it.
    ANSWERS+=.$$
    trap 'rm -rf "$ANSWERS"' EXIT
    rm -rf "$ANSWERS"
    mkdir -p "$ANSWERS"
  fi
  # A worker that failed says so in its answer; one that did not answer is missed there.
  provision_ssh_all "$ANSWERS" "$1" || true
}

answer_of() { sed -n 's/^answer \([0-9][0-9]*\)$/\1/p' "$ANSWERS/$1.log" 2>/dev/null | tail -n 1; }

# Stop unless every worker answered 0; say what the others wrote.
check_answers() {
  local what=$1 count worker answer worst=0
  if [[ $DRY_RUN == 1 ]]; then return; fi
  count=$(provision_workers)
  for ((worker = 0; worker < count; worker++)); do
    answer=$(answer_of "$worker")
    if [[ -z $answer ]]; then
      say "worker $worker did not answer: $(tail -n 3 "$ANSWERS/$worker.log" 2>/dev/null || true)"
      worst=4
    elif ((answer)); then
      say "worker $worker: $(grep -v '^answer ' "$ANSWERS/$worker.log" | tail -n 5)"
      if ((worst != 4)); then worst=$answer; fi
    fi
  done
  if [[ -e $ANSWERS/$count.log ]]; then
    mistake "ACCELERATOR=$ACCELERATOR has $count workers, and $POD_NAME has more; give the type it was created with"
  fi
  if ((worst)); then
    if [[ -s $ANSWERS/stderr ]]; then tail -n 5 "$ANSWERS/stderr" >&2; fi
    return "$worst"
  fi
  say "$what: done on $count workers"
}

# Ask all workers for their run. STATES[N] is "STATE name=value ...", RUN_STATE what they are together: running,
# finished, failed, stopped, none, partial (they differ) or unreachable.
ask_states() {
  local worker count state line
  STATES=()
  on_all state
  if [[ $DRY_RUN == 1 ]]; then
    RUN_STATE=none
    return
  fi
  count=$(provision_workers)
  local -A seen=()
  for ((worker = 0; worker < count; worker++)); do
    line=$(sed -n 's/^state //p' "$ANSWERS/$worker.log" 2>/dev/null | tail -n 1)
    STATES+=("${line:-unreachable}")
    read -r state _ <<<"${line:-unreachable}"
    state=${state%,}
    seen[$state]=1
  done
  # shellcheck disable=SC2034  # the scripts read it
  RUN_STATE=$(joint_state "${!seen[@]}")
}

# The state of a run from the different states of its workers.
joint_state() {
  local all=" $* "
  case $all in
    *" unreachable "*) echo unreachable ;;
    " running " | " none " | " finished ") echo "$1" ;;
    *" running "* | *" none "*) echo partial ;;
    *" failed "*) echo failed ;;
    *) echo stopped ;;
  esac
}

# The value of NAME in the states of the workers, each once: field NAME
field() {
  local state
  for state in "${STATES[@]}"; do
    if [[ " $state " =~ \ $1=([^ ]*)\  ]]; then echo "${BASH_REMATCH[1]}"; fi
  done | sort -u
}

# A short name for a command line, to know it again.
digest() { printf '%q ' "$@" | cksum | cut -d ' ' -f 1; }

# shellcheck source=provision.sh
source "$SCRIPTS/provision.sh"
