"""Where compiled programs are kept, and what is counted."""

import jax
import jax.numpy as jnp
import pytest

from jgrpo.runtime.compilations import Compilations
from model_port.libraries import keep_compiled


@pytest.fixture
def cache_dir(monkeypatch):
    """Restore the setting of the session afterwards."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache_directory(cache_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jgrpo" / "compiled")


def test_a_directory_that_was_named_stays(cache_dir, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_programs_of_a_run_are_counted_by_shape():
    @jax.jit
    def rollout(x):
        return x + 1

    @jax.jit
    def other(x):
        return x + 2

    compilations = Compilations()
    for shape in ((2,), (3,), (2,)):
        rollout(other(jnp.zeros(shape)))
    assert compilations.count == 2
    compilations.close()
    rollout(jnp.zeros(4))
    assert compilations.count == 2
