# SPDX-License-Identifier: Apache-2.0
"""Every clip is decoded once before anything is written, on all cores; what was found outlives an interruption."""

import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jgrpo.runtime.worker import start_worker
from model_port.audio import AudioError, load_audio
from model_port.errors import UserError
from model_port.features import log_mel

IN_FLIGHT = 4  # clips per worker that are in memory at a time
MAX_SAMPLES = 2**31 - 1  # a record's `samples` is an int32
LOG_EVERY = 10.0  # seconds between two lines of progress in a log

# What load_audio finds -> the reason of a drop.
REASONS = {
    "missing": "missing clip",
    "empty": "empty clip",
    "unsupported": "unsupported format",
    "undecodable": "undecodable",
    "truncated": "truncated",
    "too short": "too short",
}


@dataclass(frozen=True)
class Checked:
    """What is known about a clip.

    Attributes:
        name, size, changed: of the member it came from.
        samples: how many load_audio gives; 0 where it fails.
        reason, detail: why it is unusable; empty where it is not.
    """

    name: str
    size: int
    changed: int
    samples: int
    reason: str = ""
    detail: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.size, self.changed


def check_clip(name: str, data: bytes) -> tuple[int, str, str]:
    """Decode a clip; return its samples at 16 kHz, or 0 and the reason and detail of its drop."""
    try:
        wave = load_audio(data, name=name)
    except AudioError as error:
        return 0, REASONS[error.kind], str(error)
    if not np.isfinite(wave).all():
        return 0, "undecodable", f"{name}: NaN or infinite samples"
    if len(wave) > MAX_SAMPLES:
        return 0, "unsupported format", f"{name}: longer than {MAX_SAMPLES} samples"
    return len(wave), "", ""


def clip_features(name: str, data: bytes) -> bytes:
    """Return the log-mel features of a clip, float32 [A, 160], as little-endian bytes."""
    return log_mel(load_audio(data, name=name)).astype("<f4", copy=False).tobytes()


class Workers:
    """Processes that decode; with a count of 0, this process does.

    Args:
        count: None for one per core that this process may use.
    """

    def __init__(self, count: int | None):
        if count is not None and count < 0:
            raise UserError(f"workers are {count}: give 0 or more.")
        self._count = _cores() if count is None else count
        self._pool = None

    def map(self, function: Callable[[str, bytes], Any], clips: Iterable[tuple]) -> Iterator[tuple]:
        """Yield (*clip, function(name, data)) for each clip (name, data, ...), in order.

        Clips are drawn a few per worker ahead, so memory does not depend on how many there are.
        """
        if not self._count:
            for clip in clips:
                yield *clip, function(*clip[:2])
            return
        self._pool = self._pool or self._start()
        waiting, clips = collections.deque(), iter(clips)
        try:
            for clip in itertools.islice(clips, self._count * IN_FLIGHT):
                waiting.append((clip, self._pool.submit(function, *clip[:2])))
            while waiting:
                clip, future = waiting.popleft()
                yield *clip, future.result()
                for further in itertools.islice(clips, 1):
                    waiting.append((further, self._pool.submit(function, *further[:2])))
        except BrokenProcessPool as error:
            raise UserError(
                "a process that decodes audio died: it ran out of memory, was killed or crashed, or the program does "
                'not guard its start by `if __name__ == "__main__":`. The same command goes on from here; with '
                "--workers 0 everything is decoded in one process."
            ) from error

    def _start(self) -> ProcessPoolExecutor:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":  # the imports are paid for once, and their memory is shared
            context.set_forkserver_preload([__name__])
        return ProcessPoolExecutor(self._count, mp_context=context, initializer=_start_worker)

    def close(self) -> None:
        """Drop what has not been started and end the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    # The mp3 decoder's remarks on damaged files, which become drops; exceptions travel with the results.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    start_worker()


class CheckLog:
    """Results on disk, one JSON line each, written as they come."""

    def __init__(self, path: Path | None):
        self._known = {}
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole = path.read_bytes()
            end = whole.rfind(b"\n") + 1  # a kill may have cut the last line
            for line in whole[:end].splitlines():
                # What another version wrote is found out again.
                with contextlib.suppress(ValueError, TypeError):
                    checked = Checked(**json.loads(line))
                    self._known[checked.key] = checked
            os.truncate(path, end)
        self._file = path.open("a", encoding="utf-8")

    def get(self, name: str, size: int, changed: int) -> Checked | None:
        """Return what an earlier build found, if the file is still the one that it read."""
        return self._known.get((name, size, changed))

    def add(self, checked: Checked) -> None:
        """Keep a result."""
        if self._file is not None:
            self._file.write(json.dumps(asdict(checked)) + "\n")
            self._file.flush()

    def close(self) -> None:
        """End the file; it can be opened again."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "CheckLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], Any]]:
    """Count clips on standard error: a bar on a terminal, a line every ten seconds in a log."""
    live = sys.stderr.isatty()
    with tqdm(
        total=total, desc=what, unit=" clips", mininterval=0.1 if live else LOG_EVERY, delay=1.0, leave=False
    ) as bar:
        yield bar.update
