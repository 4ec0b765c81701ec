#!/usr/bin/env bash
# What the other scripts run on every worker; it has no use elsewhere.
#
#   unpack ARCHIVE               put a new version of the source in place of the old one
#   install PYTHON EXTRAS UV     uv, Python and the packages that the source asks for
#   mount DEVICE DIRECTORY       a disk that is shared read-only
#   fetch URL DIRECTORY          a directory of a bucket, into the source
#   convert SOURCE TARGET ...    model-port convert, from and to a bucket
#   start NAME COMMAND ...       a run that outlives this connection
#   state                        "state none|running|finished|stopped|failed ..."
#   logs LINES FOLLOW            the end of the run's log
#   stop GRACE POLL ASKED        SIGTERM, GRACE seconds, SIGKILL, and a look that nothing is left; ASKED is yes if a
#                                person wants the run to end, no if it will be started again
#
# The directory that holds the source also holds venv/, run/ (the present run: token, pid, started, command, exit_code,
# stop_requested, log) and logs/. The last line of what is written is "answer EXIT_STATUS".
set -euo pipefail

BASE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
SOURCE=$BASE/source RUN=$BASE/run

fail() { end 1 "$@"; }
mistake() { end 2 "$@"; }
refuse() { end 3 "$@"; }

end() {
  echo "error: ${*:2}"
  exit "$1"
}

# Processes whose environment has NAME=token of the present run, for any NAME given. Every descendant of the run
# inherits it, so none escapes by leaving its process group, and a number that is used again does not match.
processes() {
  local token name path patterns=()
  if [[ ! -f $RUN/token ]]; then return; fi
  token=$(<"$RUN/token")
  for name in "$@"; do patterns+=(-e "$name=$token"); done
  { grep -lsz -x -F "${patterns[@]}" /proc/[0-9]*/environ || true; } | while IFS= read -r path; do
    path=${path#/proc/}
    echo "${path%/environ}"
  done
}

in_progress() { [[ -n $(processes JGRPO_RUN JGRPO_SUPERVISOR) ]]; }

refuse_in_progress() {
  if in_progress; then refuse "a run is in progress on $(hostname): stop.sh ends it, status.sh describes it"; fi
}

unpack() {
  refuse_in_progress
  rm -f "$BASE/source.id"
  mkdir -p "$SOURCE"
  tar -tzf "$1" | LC_ALL=C sort >"$BASE/files.new"
  if [[ -f $BASE/files ]]; then
    LC_ALL=C sort -u "$BASE/files" | LC_ALL=C comm -23 - "$BASE/files.new" |
      while IFS= read -r file; do rm -f -- "$SOURCE/$file"; done
  fi
  # Both lists count until the new files are there, should this be interrupted.
  cat "$BASE/files.new" >>"$BASE/files"
  tar -xzf "$1" -C "$SOURCE"
  mv "$BASE/files.new" "$BASE/files"
  sha256sum <"$1" | cut -c 1-12 >"$BASE/source.id"
  rm -rf "$1" "$BASE/incoming"
  echo "source $(cat "$BASE/source.id")"
}

# What an installation was made of.
recipe() { printf '%s\n' "$@" | cat - "$SOURCE/pyproject.toml" "$SOURCE/constraints.txt" | sha256sum; }

install_packages() {
  local python=$1 extras=$2 version=$3 uv=$BASE/bin/uv
  refuse_in_progress
  if [[ -f $BASE/installed && $(recipe "$@") == $(cat "$BASE/installed") ]]; then
    echo "already installed"
    return
  fi
  rm -f "$BASE/installed"
  if [[ ! -x $uv || $("$uv" --version) != "uv $version"* ]]; then
    curl -LsSf --retry 5 "https://astral.sh/uv/$version/install.sh" |
      env UV_UNMANAGED_INSTALL="$BASE/bin" sh
  fi
  "$uv" venv --quiet --allow-existing --python "$python" "$BASE/venv"
  "$uv" pip install --quiet --python "$BASE/venv/bin/python" --constraint "$SOURCE/constraints.txt" \
    --editable "${SOURCE}[$extras]"
  printf '%s\n' "$@" >"$BASE/install.arguments"
  recipe "$@" >"$BASE/installed"
  echo "installed with uv $version, Python $python, extras $extras"
}

mount_disk() {
  if mountpoint -q "$2"; then
    echo "$2 is mounted"
    return
  fi
  sudo mkdir -p "$2"
  sudo mount -o ro,noload "$1" "$2"
  echo "mounted $1 at $2, read-only"
}

fetch() {
  mkdir -p "$SOURCE/$2"
  gcloud storage rsync --recursive "$1" "$SOURCE/$2"
  echo "fetched $1"
}

convert() {
  local source=$1 target=$2 scratch=$BASE/convert out
  shift 2
  refuse_in_progress
  if [[ $target == gs://* ]]; then
    if gcloud storage ls "$target" >/dev/null 2>&1; then refuse "$target exists; remove it or give another name"; fi
    out=$scratch/out
  else
    out=$target
  fi
  rm -rf "$scratch/out"
  mkdir -p "$scratch/in"
  case $source in
    gs://*)
      gcloud storage rsync --recursive "$source" "$scratch/in"
      source=$scratch/in
      ;;
    hf:*)
      "$BASE/venv/bin/hf" download "${source#hf:}" --local-dir "$scratch/in"
      source=$scratch/in
      ;;
  esac
  (cd "$SOURCE" && "$BASE/venv/bin/model-port" convert "$source" "$out" "$@")
  if [[ $target == gs://* ]]; then gcloud storage rsync --recursive "$out" "$target"; fi
  rm -rf "$scratch"
  echo "converted to $target"
}

check_setup() {
  local arguments
  if [[ ! -f $BASE/source.id ]]; then refuse "the source on $(hostname) is not complete: give sync.sh"; fi
  if [[ ! -f $BASE/installed ]]; then refuse "the packages on $(hostname) are not installed: give setup.sh"; fi
  mapfile -t arguments <"$BASE/install.arguments"
  if [[ $(recipe "${arguments[@]}") != $(cat "$BASE/installed") ]]; then
    refuse "pyproject.toml or constraints.txt has changed since setup.sh installed the packages: give it again"
  fi
}

start() {
  local name=$1 log tries
  shift
  refuse_in_progress
  check_setup
  rm -rf "$RUN"
  mkdir -p "$RUN" "$BASE/logs"
  if [[ -f $HOME/jgrpo.env ]]; then mv "$HOME/jgrpo.env" "$RUN/env"; else touch "$RUN/env"; fi
  chmod 600 "$RUN/env"
  log=$BASE/logs/$(date -u +%Y%m%d-%H%M%S).log
  ln -s "$log" "$RUN/log"
  cat /proc/sys/kernel/random/uuid >"$RUN/token"
  echo "$name" >"$RUN/name"
  printf '%q ' "$@" >"$RUN/command"
  date -u +%Y-%m-%dT%H:%M:%SZ >"$RUN/started"
  JGRPO_SUPERVISOR=$(cat "$RUN/token") setsid bash "${BASH_SOURCE[0]}" supervise "$@" </dev/null >>"$log" 2>&1 &
  for ((tries = 0; tries < 200; tries++)); do
    if [[ -s $RUN/pid ]]; then break; fi
    sleep 0.05
  done
  if [[ ! -s $RUN/pid ]]; then fail "the run did not start: $(tail -n 3 "$log")"; fi
  echo "started, process $(cat "$RUN/pid"), log $log"
}

# The parent of a run: it stays until the run ends and writes down how.
supervise() {
  local line child code passed
  cd "$SOURCE"
  while IFS= read -r line; do export "${line?}"; done <"$RUN/env"
  export PATH=$BASE/venv/bin:$PATH VIRTUAL_ENV=$BASE/venv
  JGRPO_RUN=$(cat "$RUN/token")
  export JGRPO_RUN
  unset JGRPO_SUPERVISOR
  trap '' HUP
  echo "== $(cat "$RUN/started") $(hostname): $(cat "$RUN/command")"
  "$@" &
  child=$!
  # A host that shuts down sends SIGTERM to all processes.
  trap 'passed=1; kill -TERM "$child" 2>/dev/null || true' TERM
  echo "$child" >"$RUN/pid.new"
  mv "$RUN/pid.new" "$RUN/pid"
  while :; do
    passed=0 code=0
    wait "$child" || code=$?
    if ((passed == 0)); then break; fi
  done
  echo "== $(date -u +%Y-%m-%dT%H:%M:%SZ) $(hostname): exit status $code"
  echo "$code" >"$RUN/exit_code.new"
  mv "$RUN/exit_code.new" "$RUN/exit_code"
}

state() {
  local word=failed code
  if [[ ! -f $RUN/token ]]; then
    echo "state none source=$(cat "$BASE/source.id" 2>/dev/null || echo incomplete)"
    return
  fi
  code=$(cat "$RUN/exit_code" 2>/dev/null || echo unknown)
  if in_progress; then
    word=running
  elif [[ $code == 0 ]]; then
    word=finished
  elif [[ $code == 143 || -f $RUN/stop_requested ]]; then
    word=stopped
  fi
  echo "state $word run=$(cat "$RUN/name") since=$(cat "$RUN/started") pid=$(cat "$RUN/pid" 2>/dev/null || echo none)" \
    "exit=$code asked=$([[ -f $RUN/stop_requested ]] && echo yes || echo no)" \
    "source=$(cat "$BASE/source.id" 2>/dev/null || echo incomplete) host=$(hostname)"
}

logs() {
  local host follow=()
  if [[ ! -f $RUN/token ]]; then refuse "no run on $(hostname)"; fi
  host=$(hostname)
  if [[ $2 == 1 ]]; then
    follow=(--follow=name)
    # tail ends with the run; one that has ended is shown once.
    local supervisor
    supervisor=$(processes JGRPO_SUPERVISOR | head -n 1)
    if [[ -n $supervisor ]]; then follow+=("--pid=$supervisor" --sleep-interval=0.5); else follow=(); fi
  fi
  tail -n "$1" "${follow[@]}" "$(readlink "$RUN/log")" | sed -u "s/^/[$host] /"
}

signal_all() {
  local process
  for process in $(processes JGRPO_RUN); do kill "-$1" "$process" 2>/dev/null || true; done
}

# SIGTERM goes to the run's first process alone: it saves what it must, and may need its helpers for that. Once it has
# ended, they get it too.
stop() {
  local grace=$1 poll=$2 asked=$3 main asked_all=0 end killed=0
  if [[ ! -f $RUN/token ]]; then
    echo "no run"
    return
  fi
  if ! in_progress; then
    echo "had ended, exit status $(cat "$RUN/exit_code" 2>/dev/null || echo unknown)"
    return
  fi
  if [[ $asked == yes ]]; then touch "$RUN/stop_requested"; fi
  main=$(cat "$RUN/pid" 2>/dev/null || echo 0)
  if grep -qx -- "$main" <(processes JGRPO_RUN); then kill -TERM "$main" 2>/dev/null || true; fi
  end=$((SECONDS + grace))
  while in_progress; do
    if ((SECONDS >= end)); then
      killed=1
      break
    fi
    if ((asked_all == 0)) && ! grep -qx -- "$main" <(processes JGRPO_RUN); then
      signal_all TERM
      asked_all=1
    fi
    sleep "$poll"
  done
  if ((killed)); then kill_all "$poll"; fi
  echo "stopped$( ((killed)) && echo " by SIGKILL after $grace s")," \
    "exit status $(cat "$RUN/exit_code" 2>/dev/null || echo unknown)"
}

kill_all() {
  local poll=$1 end=$((SECONDS + 10))
  while in_progress; do
    signal_all KILL
    if ((SECONDS >= end)); then
      fail "still there after SIGKILL: processes $(processes JGRPO_RUN | paste -s -d ' ' -) on $(hostname)"
    fi
    sleep "$poll"
  done
}

main() {
  local verb=$1
  shift
  if [[ $verb != supervise ]]; then trap 'echo "answer $?"' EXIT; fi
  case $verb in
    unpack) unpack "$@" ;;
    install) install_packages "$@" ;;
    mount) mount_disk "$@" ;;
    fetch) fetch "$@" ;;
    convert) convert "$@" ;;
    start) start "$@" ;;
    supervise) supervise "$@" ;;
    state) state ;;
    logs) logs "$@" ;;
    stop) stop "$@" ;;
    *) mistake "unknown verb '$verb'" ;;
  esac
}

# On one line: bash has read all of it before it runs, and unpack may put another file in this one's place.
{ main "$@"; exit; }
