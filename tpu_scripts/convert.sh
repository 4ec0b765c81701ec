#!/usr/bin/env bash
# convert.sh [--dry-run] SOURCE TARGET [-- OPTIONS of model-port convert]
#
# Convert weights on worker 0, after setup.sh: convert.sh hf:ibm-granite/granite-speech-3.3-8b gs://my-bucket/granite-8b
# SOURCE is hf:OWNER/MODEL, a gs:// directory or a path on the worker; TARGET a gs:// directory or a path on the worker,
# and must not exist. FETCH (sync.sh --help) brings it to all workers.
#
# Variables: those of the slice (create.sh --help). HF_TOKEN is not passed on; gated models go by way of a bucket.
#
# Exit status: 0 done; 2 a mistake in arguments or variables; 3 slice not ready, run in progress or TARGET there
# already; otherwise that of the step that failed.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"

if ((${#ARGS[@]} < 2)); then mistake "SOURCE and TARGET are needed; see ${0##*/} --help"; fi
SOURCE=${ARGS[0]} TARGET=${ARGS[1]}
options=("${ARGS[@]:2}")
if ((${#options[@]})); then
  if [[ ${options[0]} != -- ]]; then unknown_argument "${options[0]}"; fi
  options=("${options[@]:1}")
fi
check SOURCE '(hf:[^/ ]+/[^/ ]+|gs://[^ ]+|/[^ ]+)' "hf:OWNER/MODEL, gs://BUCKET/DIRECTORY or an absolute path" \
  hf:ibm-granite/granite-speech-3.3-8b
check TARGET '(gs://[^ ]+|/[^ ]+)' "gs://BUCKET/DIRECTORY or an absolute path on the worker" \
  gs://my-bucket/granite-8b
check_slice
require_ready
provision_ssh 0 "$(worker_command convert "$SOURCE" "$TARGET" "${options[@]}")"
