#!/usr/bin/env bash
# run.sh [--dry-run] -- COMMAND ...
#
# Start the same command on every worker, detached from the connection, in the source directory and with the
# environment that setup.sh made: run.sh -- jgrpo grpo configs/demo_grpo.py --run-dir runs/pod
# What it writes goes to a log on the worker (logs.sh). Refused while a run is in progress.
#
# Variables: those of the slice (create.sh --help); JAX_COORDINATOR_PORT (8476), LIBTPU_INIT_ARGS,
# JAX_COMPILATION_CACHE_DIR, and ENV_FILE, a file of NAME=VALUE lines for what else the command needs; its values are
# taken as they are and show in no command line.
#
# Exit status: 0 started on all workers; 1 not started; 2 a mistake in arguments or variables; 3 slice not ready, not
# set up, or run in progress; 4 a worker did not answer.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"
take_command
check_slice
JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476}
check JAX_COORDINATOR_PORT '[1-9][0-9]{3,4}' "a port; the firewall of TPU slices opens 8470, 8471, 8474 and 8476" 8476
check_optional JAX_COMPILATION_CACHE_DIR '(gs://|/)[^ ]+' "gs://BUCKET/DIRECTORY or an absolute path" gs://my-bucket/xla

# The settings of the run, in a file that only this user reads.
write_settings() {
  local line number=0
  echo "JAX_COORDINATOR_PORT=$JAX_COORDINATOR_PORT"
  if [[ -n ${LIBTPU_INIT_ARGS:-} ]]; then echo "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS"; fi
  if [[ -n ${JAX_COMPILATION_CACHE_DIR:-} ]]; then echo "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR"; fi
  if [[ -z ${ENV_FILE:-} ]]; then return; fi
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    if [[ -z $line || $line == \#* ]]; then continue; fi
    if [[ ! $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; then
      mistake "$ENV_FILE, line $number is not NAME=VALUE; comments begin with #, quotes and 'export' do not belong"
    fi
    printf '%s\n' "$line"
  done <"$ENV_FILE"
}

if [[ -n ${ENV_FILE:-} && ! -r $ENV_FILE ]]; then
  mistake "ENV_FILE is '$ENV_FILE', which cannot be read; it takes a file of NAME=VALUE lines"
fi
settings=$LOCAL_DIR/env
if [[ $DRY_RUN == 1 ]]; then write_settings >/dev/null; else (umask 077 && write_settings >"$settings"); fi

require_ready
ask_states
case $RUN_STATE in
  running | partial)
    if [[ " ${STATES[*]}" == *" running "* ]]; then
      refuse "a run is in progress on $POD_NAME; logs.sh follows it, stop.sh ends it"
    fi
    ;;
  unreachable) check_answers "state" || exit $? ;;
esac
provision_copy "$settings" jgrpo.env || unanswered "the settings did not reach all workers; nothing was started"
if [[ $DRY_RUN != 1 ]]; then rm -f "$settings"; fi
on_all start "$(digest "${COMMAND[@]}")" "${COMMAND[@]}"
status=0
check_answers "start" || status=$?
if ((status)); then
  say "not all workers started; stopping those that did"
  on_all stop 10 1 no
  exit "$status"
fi
