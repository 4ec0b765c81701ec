#!/usr/bin/env bash
# delete.sh [--yes] [--dry-run]
#
# Give the slice back, with everything on the disks of its workers, after the name is typed or with --yes. A run in
# progress ends at once; stop.sh before this lets it save. A slice that does not exist is no error.
#
# Variables: those of the slice (create.sh --help).
#
# Exit status: 0 it is gone; 1 it could not be deleted; 2 a mistake in arguments or variables; 3 not confirmed.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"

yes=0
for argument in "${ARGS[@]}"; do
  case $argument in
    --yes) yes=1 ;;
    *) unknown_argument "$argument" ;;
  esac
done
check_slice

answer=$(provision_state ready)
read -r state detail <<<"$answer"
if [[ $state == absent ]]; then
  say "$POD_NAME does not exist in $ZONE; nothing to delete"
  exit 0
fi
if [[ $yes != 1 && $DRY_RUN != 1 ]]; then
  say "$POD_NAME ($ACCELERATOR in $ZONE, $detail) and the disks of its workers will be deleted."
  printf 'Type its name to go on: ' >&2
  read -r typed || typed=""
  if [[ $typed != "$POD_NAME" ]]; then refuse "not confirmed; nothing was deleted"; fi
fi
provision_delete || fail "$POD_NAME was not deleted; see the message above, and give delete.sh again"
