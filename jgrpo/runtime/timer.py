# SPDX-License-Identifier: Apache-2.0
"""Seconds by phase of a step."""

import contextlib
import time
from collections.abc import Callable, Iterator


class PhaseTimer:
    """Adds up wall-clock seconds by phase name.

    JAX returns before the device has finished: a phase ends with something that waits for its result, or its time is
    counted in the next one.

    >>> timer = PhaseTimer()
    >>> with timer("rollout"):
    ...     pass
    >>> list(timer.take())
    ['rollout']
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body; repeated phases add up, and a body that raises is counted too."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, and start again from nothing."""
        seconds, self._seconds = self._seconds, {}
        return seconds
