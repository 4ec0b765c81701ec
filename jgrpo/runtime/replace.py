# SPDX-License-Identifier: Apache-2.0
"""A directory that is replaced by a new version of itself."""

import contextlib
import os
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils

from model_port.paths import as_path, is_remote


@contextlib.contextmanager
def replaced(directory: str | os.PathLike, *, mark: str) -> Iterator[epath.Path]:
    """Yield where the new version is to be written; whenever a process is killed, none is there or a whole one.

    All processes of a run enter it together.

    Args:
        mark: the file that is written last, and without which the directory is not what it should be.
    """
    final, first = as_path(directory), jax.process_index() == 0
    aside, old = (final.parent / f"{final.name}.{suffix}" for suffix in ("new", "old"))
    if is_remote(final):  # where directories are neither renamed nor removed at once
        aside = final
    if first:
        (aside / mark).unlink(missing_ok=True)
        aside.rmtree(missing_ok=True)
    multihost_utils.sync_global_devices(f"made room for {final}")
    yield aside
    if first and aside != final:
        # Two renames: a kill between them leaves nothing there.
        old.rmtree(missing_ok=True)
        if final.exists():
            final.rename(old)
        aside.rename(final)
        old.rmtree(missing_ok=True)
