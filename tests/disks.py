"""A disk that fills up."""

import contextlib
import resource
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the disk's refusal, without a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
