#!/usr/bin/env bash
# sync.sh [--dry-run]
#
# Copy the working tree to all workers: what git tracks, as it is now, and what it does not ignore. Files that were
# removed here are removed there. Then fetch directories from buckets, what has changed of them.
#
# Variables: those of the slice (create.sh --help); EXCLUDE, patterns of files to leave out (git pathspecs, spaces
# between them); FETCH, a list of gs://BUCKET/DIRECTORY=PATH with spaces between them, PATH inside the source;
# REMOTE_DIR (jgrpo), the directory in the home of the workers; SOURCE_ARCHIVE, an archive to send instead of the tree.
#
# Exit status: 0 done; 1 failed on a worker; 2 a mistake in a variable; 3 slice not ready or run in progress; 4 a worker
# did not answer.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags "$@"
no_arguments
check_slice
read -ra fetches <<<"${FETCH:-}"
for pair in "${fetches[@]}"; do
  if [[ ! $pair =~ ^gs://[^=]+=[A-Za-z0-9_][A-Za-z0-9_./-]*$ || $pair == *..* ]]; then
    mistake "FETCH has '$pair'; allowed is gs://BUCKET/DIRECTORY=PATH, PATH inside the source:" \
      "export FETCH='gs://my-bucket/granite-8b=models/granite-8b'"
  fi
done
if [[ -n ${SOURCE_ARCHIVE:-} && ! -f $SOURCE_ARCHIVE && $DRY_RUN != 1 ]]; then
  mistake "SOURCE_ARCHIVE is '$SOURCE_ARCHIVE', which is no file; unset it to send the working tree"
fi
if ! git -C "$ROOT" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
  mistake "$ROOT is not a git working tree, and git says what is sent; clone the repository"
fi
require_ready

archive=${SOURCE_ARCHIVE:-}
if [[ -z $archive ]]; then
  archive=$LOCAL_DIR/source.tar.gz
  make_archive "$archive"
fi
arrived=$REMOTE_DIR.source.tar.gz
provision_copy "$archive" "$arrived" || unanswered "the source did not reach all workers; see the messages above"
incoming=$REMOTE_DIR/incoming
ask_all "mkdir -p $incoming && tar -xzf $arrived -C $incoming tpu_scripts/worker.sh &&\
 bash $incoming/tpu_scripts/worker.sh unpack $arrived"
check_answers "source"

for pair in "${fetches[@]}"; do
  on_all fetch "${pair%=*}" "${pair##*=}"
  check_answers "${pair##*=}"
done
