#!/usr/bin/env bash
# logs.sh [--worker N|all] [--lines N] [--no-follow] [--dry-run]
#
# Show the end of the run's log and follow it until the run ends. Each line begins with the name of its host.
# By default worker 0 and 20 lines.
#
# Variables: those of the slice (create.sh --help).
#
# Exit status: 0 shown; 2 a mistake in arguments or variables; 3 no run; otherwise that of ssh.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"

WORKER=0 LINES_SHOWN=20 follow=1
set -- "${ARGS[@]}"
while (($#)); do
  case $1 in
    --worker | --lines)
      if (($# < 2)); then mistake "$1 needs a value; see ${0##*/} --help"; fi
      if [[ $1 == --worker ]]; then WORKER=$2; else LINES_SHOWN=$2; fi
      shift
      ;;
    --no-follow) follow=0 ;;
    *) unknown_argument "$1" ;;
  esac
  shift
done
check_slice
count=$(provision_workers)
if [[ $WORKER != all ]] && { [[ ! $WORKER =~ ^(0|[1-9][0-9]{0,3})$ ]] || ((WORKER >= count)); }; then
  mistake "--worker $WORKER; allowed is all, or a number from 0 to $((count - 1))"
fi
if [[ ! $LINES_SHOWN =~ ^[0-9]+$ ]]; then mistake "--lines $LINES_SHOWN; allowed is a whole number"; fi
provision_ssh "$WORKER" "$(worker_command logs "$LINES_SHOWN" "$follow")"
