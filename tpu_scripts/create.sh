#!/usr/bin/env bash
# create.sh [--no-wait] [--dry-run]
#
# Ask for the slice and wait until it can be used. One that exists already is waited for.
#
# Variables: POD_NAME, PROJECT, ZONE, ACCELERATOR (v4-N, v5litepod-N, v5p-N, v6e-N). SPOT=1, RESERVED=1,
# RESERVATION_PROJECT, VALID_UNTIL (6h: give up the queue), NETWORK, SUBNETWORK, INTERNAL_IPS=1, SERVICE_ACCOUNT,
# DATA_DISK (attached read-only), LABELS, RUNTIME_VERSION. WAIT_SECONDS (86400) is the longest wait, POLL_SECONDS (30)
# the time between two looks.
#
# Exit status: 0 ready (with --no-wait: asked for); 1 not granted, lost or too late; 2 a mistake in a variable.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"

wait=1
for argument in "${ARGS[@]}"; do
  case $argument in
    --no-wait) wait=0 ;;
    *) unknown_argument "$argument" ;;
  esac
done
check_slice
WAIT_SECONDS=${WAIT_SECONDS:-86400}
check_whole WAIT_SECONDS 86400

answer=$(provision_state absent)
read -r state detail <<<"$answer"
case $state in
  absent) provision_create ;;
  lost | deleting) fail "$POD_NAME is $state ($detail); delete.sh makes room for a new one" ;;
  *) say "$POD_NAME exists: $detail" ;;
esac
if ((wait == 0)); then exit 0; fi

said=""
while :; do
  answer=$(provision_state ready)
  read -r state detail <<<"$answer"
  if [[ $detail != "$said" ]]; then say "$(date +%H:%M:%S) $POD_NAME: $state ($detail)"; fi
  said=$detail
  case $state in
    ready) exit 0 ;;
    waiting) ;;
    *) fail "$POD_NAME became $state ($detail) while it was waited for; delete.sh makes room for a new one" ;;
  esac
  if ((SECONDS >= WAIT_SECONDS)); then
    fail "$POD_NAME is still $detail after $WAIT_SECONDS s; it stays in the queue: give create.sh again, or delete.sh"
  fi
  sleep "$POLL_SECONDS"
done
