# SPDX-License-Identifier: Apache-2.0
"""Metrics and completions of a run, on disk."""

import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from model_port.errors import UserError
from model_port.paths import as_path, is_remote, room_for, write_whole

METRICS = "metrics.jsonl"
FLUSH_SECONDS = 60  # between two uploads


class MetricsWriter:
    """Writes metrics.jsonl, completions/ and tensorboard/ of one run directory.

    A run that was killed and resumed reads like one that was not: opening drops what was recorded for `start_step` and
    later, because those steps will be recorded again.

    A bucket cannot append. There, metrics.jsonl and TensorBoard's file grow in a temporary directory of this machine
    and are uploaded whole by `flush`, which `write` calls once a minute: a kill loses what came after. Whoever calls
    it before a checkpoint is saved loses none of the steps that the checkpoint stands for.

    Args:
        run_dir: the run directory, on a disk or gs://; made if absent.
        start_step: the first step that will be written.
        process_index: only process 0 writes; what the others are given is dropped.

    Raises:
        UserError: if metrics.jsonl holds a line that is no JSON object with a step, other than a torn last line.
    """

    def __init__(self, run_dir: str | os.PathLike, start_step: int = 0, *, process_index: int = 0):
        self._run_dir = as_path(run_dir)
        self._completions = self._run_dir / "completions"
        self._file = None
        self._board = None
        self._scratch = None
        if process_index == 0:
            self._completions.mkdir(parents=True, exist_ok=True)
            directory = self._growing_files()
            path = directory / METRICS
            _drop_from(path, start_step)
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step, flush_secs=10)
            self.flush()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line {"step": step, **metrics}; a non-finite float becomes null."""
        if self._file is None:
            return
        row = {"step": step, **{name: plain(value) for name, value in metrics.items()}}
        with room_for(self._run_dir / METRICS):
            self._file.write(_line(row))
            self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """See that all that was written is where the run directory is."""
        self._flushed = time.monotonic()
        if self._scratch is None:
            return
        self._board.flush()
        for file in Path(self._scratch.name).rglob("*"):
            if file.is_file():
                (self._run_dir / file.relative_to(self._scratch.name)).write_bytes(file.read_bytes())

    def write_completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one JSON object per row to completions/step_{step:06d}.jsonl, all of it or nothing."""
        if self._file is not None:
            path = self._completions / f"step_{step:06d}.jsonl"
            with room_for(path):
                write_whole(path, "".join(_line(plain(row)) for row in rows))

    def close(self) -> None:
        """Flush and close the files; a second call does nothing."""
        if self._file is not None:
            with room_for(self._run_dir):
                self._file.close()
                self._board.close()
                self.flush()
            self._file = self._board = None
            if self._scratch is not None:
                self._scratch.cleanup()

    def _growing_files(self) -> Path:
        """Return the directory of the files that are appended to, with the metrics so far."""
        if not is_remote(self._run_dir):
            return Path(self._run_dir)
        self._scratch = tempfile.TemporaryDirectory(prefix="jgrpo-")
        directory, metrics = Path(self._scratch.name), self._run_dir / METRICS
        if metrics.exists():
            (directory / METRICS).write_bytes(metrics.read_bytes())
        return directory


def plain(value: Any) -> Any:
    """The value as strict JSON holds it: arrays and NumPy scalars as Python values, NaN and infinities as None."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        value = np.asarray(value).tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _drop_from(path: Path, start_step: int) -> None:
    """Keep the lines of metrics.jsonl with a step before `start_step`."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    # What follows the last newline was torn by a kill in the middle of a write.
    complete = lines[:-1]
    kept = []
    for number, line in enumerate(complete, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'{path}:{number} is not a JSON object with a "step": {line[:80]!r}. '
                "Repair or remove that line, or move the file away, to go on with this run."
            ) from error
        if step < start_step:
            kept.append(line.decode("utf-8") + "\n")
    write_whole(path, "".join(kept))
