#!/usr/bin/env bash
# status.sh [--dry-run]
#
# Show the state of the slice (queued resource, node, health), of every worker, and of the run as a whole.
#
# Variables: those of the slice (create.sh --help).
#
# Exit status: 0 running, or finished; 1 failed, or the workers differ; 2 a mistake in a variable; 3 slice not ready, or
# no run; 4 a worker does not answer; 143 stopped.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"
no_arguments
check_slice

answer=$(provision_state ready)
read -r state detail <<<"$answer"
if [[ $DRY_RUN != 1 ]]; then echo "slice: $POD_NAME $state ($detail), $ACCELERATOR, $(provision_workers) workers"; fi
if [[ $state != ready ]]; then exit 3; fi
ask_states
if [[ $DRY_RUN == 1 ]]; then exit 0; fi
for worker in "${!STATES[@]}"; do echo "worker $worker: ${STATES[$worker]}"; done
echo "run: $RUN_STATE"
case $RUN_STATE in
  running | finished) exit 0 ;;
  none) exit 3 ;;
  stopped) exit 143 ;;
  unreachable)
    tail -n 5 "$ANSWERS/stderr" >&2
    exit 4
    ;;
  *) exit 1 ;;
esac
