# SPDX-License-Identifier: Apache-2.0
"""A polite end: SIGTERM is noted, the step in progress finishes, and the run saves before it leaves."""

import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stopped(Exception):
    """The run was asked to end and has saved what it needs to go on; the message says so to a person."""


class StopRequest:
    """Whether SIGTERM has come; a second one kills.

    Signals reach Python in its main thread, so elsewhere nothing is noted and SIGTERM does what it did before.
    """

    def __init__(self):
        self._asked = False
        self._main = threading.current_thread() is threading.main_thread()
        self._previous = signal.signal(signal.SIGTERM, self._note) if self._main else None

    def asked(self) -> bool:
        """Return whether any process of the run was asked to stop; every process must call this at the same step."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.process_allgather(np.array(self._asked)).any())

    def close(self) -> None:
        """Give SIGTERM back its former meaning."""
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)
            self._main = False

    def _note(self, number, frame) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
