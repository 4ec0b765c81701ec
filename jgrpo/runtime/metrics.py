"""Metrics and completions of a run, on disk."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from model_port.errors import UserError


class MetricsWriter:
    """Writes metrics.jsonl, completions/ and tensorboard/ of one run directory.

    A run that was killed and resumed reads like one that was not: opening drops what was recorded for `start_step` and
    later, because those steps will be recorded again.

    Args:
        run_dir: the run directory; made if absent.
        start_step: the first step that will be written.
        process_index: only process 0 writes; what the others are given is dropped.

    Raises:
        UserError: if metrics.jsonl holds a line that is no JSON object with a step, other than a torn last line.
    """

    def __init__(self, run_dir: str | os.PathLike, start_step: int = 0, *, process_index: int = 0):
        self._completions = Path(run_dir) / "completions"
        self._file = None
        self._board = None
        if process_index == 0:
            self._completions.mkdir(parents=True, exist_ok=True)
            path = Path(run_dir) / "metrics.jsonl"
            _drop_from(path, start_step)
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=start_step, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line {"step": step, **metrics}; a non-finite float becomes null."""
        if self._file is None:
            return
        row = {"step": step, **{name: plain(value) for name, value in metrics.items()}}
        self._file.write(_line(row))
        self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def write_completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one JSON object per row to completions/step_{step:06d}.jsonl, all of it or nothing."""
        if self._file is not None:
            path = self._completions / f"step_{step:06d}.jsonl"
            _replace(path, "".join(_line(plain(row)) for row in rows))

    def close(self) -> None:
        """Flush and close the files; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._file = self._board = None


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


def _replace(path: Path, text: str) -> None:
    """Write the whole file or leave the old one, whenever the process is killed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


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
    _replace(path, "".join(kept))
