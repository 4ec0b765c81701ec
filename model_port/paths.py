# SPDX-License-Identifier: Apache-2.0
"""Paths of files and directories that are on a disk or in a bucket, gs://.

In a bucket an object appears whole and cannot be appended to, a directory is nothing but a common beginning of names,
and renaming one copies its objects one after the other.
"""

import contextlib
import errno
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from model_port.errors import UserError

# No room left, the user's quota, the largest file that is allowed.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether the path is that of a bucket."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike) -> epath.Path:
    """Return a path that can be read and written, wherever it is.

    Raises:
        UserError: a bucket of another kind than gs://, or gs:// without what it takes.
    """
    text = os.fspath(path)
    if is_remote(text):
        if not text.startswith("gs://"):
            raise UserError(f"{text}: of buckets, gs:// is read and written; use that or a directory")
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError(f"{text}: gs:// takes the package gcsfs; install the extra gcs, as in pip install '.[gcs]'")
        import fsspec

        # What has been listed is not remembered: Orbax writes to the bucket by another library, and so do other hosts.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)


def absolute(path: str | os.PathLike) -> epath.Path:
    """Return the full path."""
    path = as_path(path)
    return path if is_remote(path) else epath.Path(os.path.abspath(os.path.expanduser(path)))


def resolved(path: str | os.PathLike) -> epath.Path:
    """Return the full path with links followed."""
    path = absolute(path)
    return path if is_remote(path) else path.resolve()


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file, so that it is the old or the new one whenever the process is killed."""
    path = as_path(path)
    if is_remote(path):
        path.write_text(text, encoding="utf-8")
        return
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def room_for(path: str | os.PathLike) -> Iterator[None]:
    """Turn a full disk, met while the block writes `path`, into a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:  # those of tensorstore are ValueErrors that carry the system's words
        words = [os.strerror(code) for code in DISK_FULL]
        reasons = [word for word in words if word in str(error)]
        if isinstance(error, UserError) or not reasons:
            raise
        raise UserError(f"cannot write {path}: {reasons[0]}; make room or choose another disk") from error


@contextlib.contextmanager
def small_files_at_hand(directory: str | os.PathLike) -> Iterator[Path]:
    """Yield the directory, of a bucket a copy for as long as the block runs, of its files alone and not of weights."""
    source = as_path(directory)
    if not is_remote(source):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="model-port-") as copy:
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(".safetensors"):
                (Path(copy) / file.name).write_bytes(file.read_bytes())
        yield Path(copy)
