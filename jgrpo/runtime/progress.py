# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run trains."""

import io
import shutil
import sys
import time
from collections.abc import Callable, Mapping


class Progress:
    """One updating line on a terminal; in a log, plain lines: the first step, the last, and one every few seconds.

    Args:
        total: number of steps of the whole run.
        shown: whether anything is written: of several processes one is enough.
        done: steps finished before this process started, of a resumed run; the time left counts from there.
        stream: where to write; standard output unless given.
        every: least seconds between two plain lines.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        shown: bool = True,
        stream: io.TextIOBase | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._done = done
        self._stream = stream if stream is not None else sys.stdout
        self._shown = shown
        self._every = every
        self._clock = clock
        self._started = clock()
        self._printed: float | None = None
        self._live = self._stream.isatty()
        self._open_line = False

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are done, with the metrics in the order given, by the names given."""
        now = self._clock()
        parts = [f"step {step}/{self._total}", *(f"{name} {_number(value)}" for name, value in metrics.items())]
        if self._done < step < self._total:
            seconds = (now - self._started) / (step - self._done) * (self._total - step)
            parts.append(f"{_duration(seconds)} left")
        elif step >= self._total:
            parts.append(f"done in {_duration(now - self._started)}")
        line = "  ".join(parts)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\x1b[K{line[:width]}")
            self._open_line = True
        elif self._printed is None or step >= self._total or now - self._printed >= self._every:
            self._printed = now
            self._write(line + "\n")

    def note(self, text: str) -> None:
        """Print a line that stays, above the updating one."""
        self._write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
        self._open_line = False

    def close(self) -> None:
        """End the updating line, so that what is printed next starts on its own."""
        if self._open_line:
            self._write("\n")
            self._open_line = False

    def _write(self, text: str) -> None:
        if self._shown:
            self._stream.write(text)
            self._stream.flush()


def _number(value: float) -> str:
    """Four significant digits, and no exponent for counts such as tokens per second."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds.

    >>> _duration(4.2), _duration(75), _duration(7260)
    ('4s', '1m 15s', '2h 01m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
