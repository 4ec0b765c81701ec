# SPDX-License-Identifier: Apache-2.0
"""What every worker process does first."""

import multiprocessing
import os
import signal
import threading


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone, however it went: nobody else would end a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
