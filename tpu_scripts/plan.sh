#!/usr/bin/env bash
# plan.sh [--dry-run] CONFIG [OPTIONS of jgrpo plan]
#
# Ask the TPU compiler whether the run of CONFIG fits the slice that ACCELERATOR names, and what it costs. It runs on
# this machine, needs no TPU and rents nothing; libtpu for it comes with the extra tpu.
#
# Variables: ACCELERATOR (create.sh --help); JGRPO (.venv/bin/jgrpo of this tree), the program.
#
# Exit status: that of jgrpo plan: 0 it fits; 1 it does not; 2 a mistake.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"

if ((${#ARGS[@]} == 0)) || [[ ${ARGS[0]} == -* ]]; then
  mistake "the config file comes first: ${0##*/} CONFIG.py [OPTIONS]; configs/ has examples"
fi
check_accelerator
run "${JGRPO:-$ROOT/.venv/bin/jgrpo}" plan "${ARGS[0]}" --topology "$(provision_topology)" "${ARGS[@]:1}"
