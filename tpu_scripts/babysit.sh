#!/usr/bin/env bash
# babysit.sh [--dry-run] -- COMMAND ...
#
# See a run through to its end: create the slice, set it up and start COMMAND; look again every POLL_SECONDS; after a
# preemption delete what is left, create it anew and start COMMAND again, which goes on from its last checkpoint. The
# run directory must outlive the slice (docs/pods.md). Stopped or killed, babysit.sh leaves the run alone; given again
# with the same COMMAND it takes over what it finds. The source is the tree as it was when babysit.sh began.
#
#   all workers ended with 0          done
#   a worker ended with 2             a mistake in COMMAND: give up
#   stop.sh ended the run             give up
#   otherwise all ended               143 is saved after SIGTERM, others may be the loss of a host: start COMMAND again
#   some run and some do not, or a    wait PATIENCE looks, then stop and start again, or delete and create again
#   worker does not answer
#   queued resource suspended or      delete, create, set up, start
#   failed, node preempted
#
# Before each new start it waits BACKOFF seconds, twice as long every time, at most BACKOFF_MAX. After MAX_RESTARTS of
# them without HEALTHY_SECONDS of running in between it gives up.
#
# Variables: those of create.sh, setup.sh, run.sh and stop.sh; POLL_SECONDS (30), BACKOFF (60), BACKOFF_MAX (1800),
# MAX_RESTARTS (5), HEALTHY_SECONDS (1800), PATIENCE (5).
#
# Exit status: 0 the run finished; 1 gave up; 2 a mistake in arguments, variables or COMMAND; 3 another run is in
# progress on the slice; 143 the run was stopped by stop.sh.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"
take_command
check_slice
BACKOFF=${BACKOFF:-60} BACKOFF_MAX=${BACKOFF_MAX:-1800} MAX_RESTARTS=${MAX_RESTARTS:-5}
HEALTHY_SECONDS=${HEALTHY_SECONDS:-1800} PATIENCE=${PATIENCE:-5} GRACE=${GRACE:-180}
check_whole BACKOFF 60
check_whole BACKOFF_MAX 1800
check_whole MAX_RESTARTS 5
check_whole HEALTHY_SECONDS 1800
check_whole PATIENCE 5
check_whole GRACE 180

# Say what is new.
note() {
  if [[ $* != "$said" ]]; then say "$(date +%H:%M:%S) babysit: $*"; fi
  said=$*
}

# again REASON: count one more restart, wait, and give up where there were too many.
again() {
  if [[ -n $running_since ]] && ((SECONDS - running_since >= HEALTHY_SECONDS)); then restarts=0; fi
  running_since="" doubts=0
  if ((restarts >= MAX_RESTARTS)); then
    note "$1; giving up after $restarts restarts without $HEALTHY_SECONDS s of running in between." \
      "logs.sh may show why; what is rented stays rented until delete.sh gives it back"
    exit 1
  fi
  local delay=$BACKOFF_MAX
  if ((restarts < 20 && (BACKOFF << restarts) < BACKOFF_MAX)); then delay=$((BACKOFF << restarts)); fi
  restarts=$((restarts + 1))
  note "$1; restart $restarts in $delay s"
  sleep "$delay"
}

# Set the workers up, where that is not done, and start the run.
launch() {
  if ! "$SCRIPTS/setup.sh"; then
    again "setup failed"
  elif ! "$SCRIPTS/run.sh" -- "${COMMAND[@]}"; then
    again "the run did not start"
  fi
}

recreate() {
  again "$1"
  "$SCRIPTS/delete.sh" --yes || note "delete failed; trying again"
}

restart() {
  again "$1"
  on_all stop "$GRACE" 1 no
  launch
}

# What to do about the run of a slice that is ready.
look_at_run() {
  ask_states
  local names
  names=$(field run)
  case $RUN_STATE in
    partial | unreachable)
      doubts=$((doubts + 1))
      note "$RUN_STATE, look $doubts of $PATIENCE: ${STATES[*]%% *}"
      if ((doubts < PATIENCE)); then return; fi
      if [[ $RUN_STATE == partial ]]; then
        restart "some workers do not run"
      else
        recreate "a worker does not answer"
      fi
      return
      ;;
    running)
      if [[ $names != "$name" ]]; then
        refuse "another command is running on $POD_NAME; stop.sh ends it, babysit.sh with that command sees it through"
      fi
      note "running on all workers"
      running_since=${running_since:-$SECONDS} doubts=0
      return
      ;;
  esac
  # It has ended, or never begun; another command's end says nothing about this one.
  if [[ $RUN_STATE == none || $names != "$name" ]]; then
    launch
  else
    after_the_end "$(field exit | paste -s -d ' ' -)"
  fi
}

# after_the_end EXIT_STATUSES: the run has ended on all workers.
after_the_end() {
  if [[ $RUN_STATE == finished ]]; then
    note "finished on all workers; the slice is still rented: delete.sh gives it back"
    exit 0
  fi
  if [[ $(field asked) == *yes* ]]; then
    note "stop.sh has ended the run; giving up"
    exit 143
  fi
  if [[ " $1 " == *" 2 "* ]]; then
    note "COMMAND ended with 2, a mistake that a new start would repeat; logs.sh shows it"
    exit 2
  fi
  again "the run ended with exit status $1"
  launch
}

if [[ $DRY_RUN == 1 ]]; then
  "$SCRIPTS/create.sh"
  "$SCRIPTS/setup.sh"
  "$SCRIPTS/run.sh" -- "${COMMAND[@]}"
  "$SCRIPTS/status.sh"
  exit 0
fi

name=$(digest "${COMMAND[@]}")
if [[ -z ${SOURCE_ARCHIVE:-} ]]; then
  export SOURCE_ARCHIVE=$LOCAL_DIR/babysit.tar.gz
  make_archive "$SOURCE_ARCHIVE"
fi
restarts=0 doubts=0 running_since="" said=""
while :; do
  # Without an answer nothing is done: the run does not need this machine.
  state=unknown detail="gcloud gives no answer"
  if answer=$(provision_state ready); then read -r state detail <<<"$answer"; fi
  case $state in
    absent) "$SCRIPTS/create.sh" --no-wait || again "the slice was not granted" ;;
    lost) recreate "the slice is lost ($detail)" ;;
    ready) look_at_run ;;
    *) note "$POD_NAME: $state ($detail)" ;;
  esac
  sleep "$POLL_SECONDS"
done
