# SPDX-License-Identifier: Apache-2.0
"""How directories are written: aside, then renamed, and in pieces that the disk takes while more are computed."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from etils import epath

from model_port.errors import UserError
from model_port.paths import as_path, is_remote, room_for

PIECE_BYTES = 2**16


@contextlib.contextmanager
def written_aside(
    path: str | os.PathLike, *, leader: bool = True, barrier: Callable[[str], None] = lambda name: None
) -> Iterator[epath.Path]:
    """Yield `path`.partial-write to write into, and rename it to `path` when the block ends without an error.

    In a bucket this is `path` itself, as a renamed directory does not appear at once: what the block writes last tells
    that all is there.

    Args:
        leader: whether this process is the one that creates, renames and removes; the others only write.
        barrier: waits for all processes.

    Raises:
        UserError: `path` exists and is not an empty directory, or the disk is full.
    """
    path = as_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; choose another directory or remove it first")
    aside = not is_remote(path)
    partial = path.parent / f"{path.name}.partial-write" if aside else path
    barrier(f"checked {path}")
    if leader:
        _remove(partial)  # what a killed process left
        partial.mkdir(parents=True)
    barrier(f"made {partial}")
    try:
        with room_for(path):
            yield partial
    except BaseException:
        if leader:
            _remove(partial)
        raise
    barrier(f"wrote {partial}")
    if leader and aside:
        _remove(path)
        partial.rename(path)
    barrier(f"renamed {partial}")


def check_space(directory: epath.Path, nbytes: int) -> None:
    """Raise a UserError if the disk of a local directory cannot take `nbytes` more."""
    if is_remote(directory):
        return
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise UserError(
            f"{directory.parent} has {free / 1e9:.2f} GB free and the weights take {nbytes / 1e9:.2f} GB; "
            "make room or choose another disk"
        )


def write_pieces(file: BinaryIO, data: np.ndarray | memoryview) -> None:
    """Write bytes, a few at a time.

    Linux keeps what it is given at once in pages as large, up to megabytes. A virtual machine often has to get such
    pages from its host first, which takes five times as long as a copy into small ones.
    """
    for begin in range(0, data.nbytes, PIECE_BYTES):
        file.write(data[begin : begin + PIECE_BYTES])
    _begin_writeback(file, data.nbytes)


def _begin_writeback(file: BinaryIO, nbytes: int) -> None:
    """Let the disk take the last `nbytes` while more are computed; the system would wait until many are due.

    To say that pages are not needed is how Python can ask for it, and it is advice: where there is no such call
    (macOS), or the file is not the system's (a bucket), nothing is asked.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    file.flush()
    with contextlib.suppress(OSError):
        os.posix_fadvise(file.fileno(), file.tell() - nbytes, nbytes, os.POSIX_FADV_DONTNEED)


def _remove(directory: epath.Path) -> None:
    if directory.exists():
        directory.rmtree()
