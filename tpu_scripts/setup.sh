#!/usr/bin/env bash
# setup.sh [--dry-run]
#
# Make the workers ready for runs: the source and what FETCH names (sync.sh), then uv, a Python environment with the
# packages of pyproject.toml at the versions of constraints.txt, and the disk. Given again it does only what is missing.
#
# Variables: those of sync.sh; PYTHON_VERSION (3.12), EXTRAS (tpu,gcs), UV_VERSION (0.13.9),
# MOUNT_DIR (/mnt/disks/data) and DISK_DEVICE (/dev/sdb), where DATA_DISK is mounted and what the workers call it.
#
# Exit status: 0 done; 1 failed on a worker; 2 a mistake in a variable; 3 slice not ready or run in progress; 4 a worker
# did not answer.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"
no_arguments
check_slice
PYTHON_VERSION=${PYTHON_VERSION:-3.12} EXTRAS=${EXTRAS:-tpu,gcs} UV_VERSION=${UV_VERSION:-0.13.9}
MOUNT_DIR=${MOUNT_DIR:-/mnt/disks/data} DISK_DEVICE=${DISK_DEVICE:-/dev/sdb}
check PYTHON_VERSION '3[.]1[123]' "3.11, 3.12 or 3.13" 3.12
check EXTRAS '[a-z]+(,[a-z]+)*' "extras of pyproject.toml with commas between them" tpu
check UV_VERSION '[0-9]+[.][0-9]+[.][0-9]+' "a release of uv" 0.13.9
check MOUNT_DIR '/[A-Za-z0-9_./-]+' "an absolute path" /mnt/disks/data
check DISK_DEVICE '/dev/[A-Za-z0-9_./-]+' "a device, as lsblk shows it on a worker" /dev/sdb

"$SCRIPTS/sync.sh"
on_all install "$PYTHON_VERSION" "$EXTRAS" "$UV_VERSION"
check_answers "packages"
if [[ -n ${DATA_DISK:-} ]]; then
  on_all mount "$DISK_DEVICE" "$MOUNT_DIR"
  check_answers "$MOUNT_DIR"
fi
