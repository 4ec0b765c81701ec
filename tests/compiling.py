"""Compilation for tests: arrays are tiny, so it takes longer than running, and many tests run the same programs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

OPTIMISED = bool(os.environ.get("OPTIMISED"))  # with it, compiled_quickly leaves the compiler as users have it


def compiled_quickly() -> contextlib.AbstractContextManager[None]:
    """Compile with few optimisations, and afterwards as before: another module of the session may have asked for it."""
    return _optimisations(disabled=not OPTIMISED)


def compiled_fully() -> contextlib.AbstractContextManager[None]:
    """Compile as users do, in a room where `compiled_quickly` holds."""
    return _optimisations(disabled=False)


@contextlib.contextmanager
def _optimisations(*, disabled: bool) -> Iterator[None]:
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, disabled)
    yield
    jax.config.update(name, before)


def shared_by_workers(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary directory of the session, one for all processes that pytest-xdist starts."""
    base = factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@contextlib.contextmanager
def compiled_once(directory: str | os.PathLike) -> Iterator[None]:
    """Compile quickly, and keep in `directory` what is compiled, small programs too."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    with compiled_quickly():
        for values in (settings, before):
            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            if values is settings:
                yield
