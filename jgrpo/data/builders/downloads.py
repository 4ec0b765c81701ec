# SPDX-License-Identifier: Apache-2.0
"""Where downloads lie: tar archives, read as a stream from front to back, and the folders they unpack to.

Both give their files as members in one order that does not change, so that a second pass meets them as the first did.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from model_port.errors import UserError

READ_SIZE = 1 << 16  # bytes asked of gzip at a time; larger pieces are copied more often than they help
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
AUDIO_SUFFIXES = frozenset((".flac", ".mp3", ".wav", ".ogg", ".opus", ".m4a", ".mp4", ".aac", ".wma"))


@dataclass(frozen=True)
class Member:
    """A file of a download; `read` works until the next member is asked for.

    Attributes:
        name: path inside the download, with forward slashes.
        changed: time of the last change, in whole seconds.
    """

    name: str
    size: int
    changed: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Archive:
    """A tar file, compressed by gzip or not."""

    path: Path

    def members(self, pick: Callable[[str], bool]) -> Iterator[Member]:
        """Give the files whose names are picked, in the order of the archive; memory does not grow with it.

        Raises:
            UserError: the archive is damaged or ends early.
        """
        try:
            with open(self.path, "rb") as raw:
                packed = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                # Not tarfile's own "r|gz", which checks no sum and takes a file that ends early for a shorter one.
                file = gzip.GzipFile(fileobj=raw) if packed else raw
                with tarfile.open(fileobj=file, mode="r|", bufsize=READ_SIZE) as tar:
                    while (entry := tar.next()) is not None:
                        name = str(PurePosixPath(entry.name))
                        if entry.isfile() and pick(name):
                            yield Member(name, entry.size, int(entry.mtime), tar.extractfile(entry).read)
                        tar.members.clear()  # it would keep an entry for each of a million clips
                while file.read(READ_SIZE):  # up to the checksum
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{self.path}: the archive is damaged or ends early ({error}); download it again, or unpack what "
                "there is and remove the archive."
            ) from error


@dataclass(frozen=True)
class Folder:
    """An unpacked archive: all files below `path`, in the order of their names."""

    path: Path

    def members(self, pick: Callable[[str], bool]) -> Iterator[Member]:
        """Give the files whose names are picked."""
        for directory, folders, files in os.walk(self.path):
            folders.sort()
            inside = Path(directory).relative_to(self.path)
            for file in sorted(files):
                name = (inside / file).as_posix()
                if pick(name):
                    path = self.path / name
                    status = path.stat()
                    yield Member(name, status.st_size, int(status.st_mtime), path.read_bytes)


Download = Archive | Folder


def find_archives(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the archives in a folder whose names without suffix match one of the patterns, each once."""
    found = [path for name in names for suffix in ARCHIVE_SUFFIXES for path in folder.glob(name + suffix)]
    return sorted({path for path in found if path.is_file()})


def stem(name: str) -> str:
    """Return what a clip is looked up by, its file name without suffix.

    >>> stem("LibriSpeech/train-clean-360/14/208/14-208-0000.flac")
    '14-208-0000'
    """
    return PurePosixPath(name).stem


def is_audio(name: str) -> bool:
    """Whether a file's suffix is one of audio, readable or not; macOS's hidden ._ companions are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("._")
