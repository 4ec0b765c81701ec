#!/usr/bin/env bash
# stop.sh [--dry-run]
#
# End the run on all workers: SIGTERM, at which it saves and leaves; after GRACE seconds SIGKILL for what is still
# there; then a look at every worker that nothing is left. Without a run there is nothing to do.
#
# Variables: those of the slice (create.sh --help); GRACE (180), seconds between SIGTERM and SIGKILL: a training step
# and a checkpoint must fit; STOP_POLL_SECONDS (1), between two looks meanwhile.
#
# Exit status: 0 nothing runs any more; 1 something is left on a worker; 2 a mistake in a variable; 3 slice not ready;
# 4 a worker did not answer.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"
no_arguments
check_slice
GRACE=${GRACE:-180} STOP_POLL_SECONDS=${STOP_POLL_SECONDS:-1}
check_whole GRACE 180
check STOP_POLL_SECONDS '[0-9]+([.][0-9]+)?' "a number of seconds" 1

require_ready
on_all stop "$GRACE" "$STOP_POLL_SECONDS" yes
check_answers "stop"
if [[ $DRY_RUN == 1 ]]; then exit 0; fi
for ((worker = 0; worker < $(provision_workers); worker++)); do
  echo "worker $worker: $(grep -v '^answer ' "$ANSWERS/$worker.log" | tail -n 1)"
done
