# SPDX-License-Identifier: Apache-2.0
"""What the libraries below are told: to keep what they compile, and to keep remarks to themselves that mean nothing."""

import contextlib
import logging
import os
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Let nothing below an error through from the logger of this name."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def keep_compiled() -> None:
    """Let later runs take their programs from disk.

    From the directory that JAX_COMPILATION_CACHE_DIR names, or jgrpo/compiled in the user's cache directory, which is
    XDG_CACHE_HOME or ~/.cache. With JAX_ENABLE_COMPILATION_CACHE=false JAX keeps nothing.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "jgrpo", "compiled"))
