"""One tiny policy on one device, its programs compiled once, and a rollout of eight prompts, for the whole room."""

import jax
import pytest

from tests.compiling import compiled_quickly
from tests.invariance.run import Run, make_targets


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These tests compare our programs with each other, so half the compile time is worth more than fast code."""
    with compiled_quickly():
        yield


@pytest.fixture(scope="session")
def run():
    """The policy on one device."""
    return Run()


@pytest.fixture(scope="session")
def out(run):
    """Three samples of six tokens for each of the eight prompts, some of them ended."""
    out = jax.device_get(run.rollout())
    ended = ~out.mask[:, :, -1]
    assert ended.any() and not ended.all()
    return out


@pytest.fixture(scope="session")
def targets(out):
    """What an update learns from that rollout, off-policy enough for some ratios to be clipped."""
    return make_targets(out)


@pytest.fixture(scope="session")
def gradient(run, targets):
    """({name: gradient}, metrics) of an update on one device with one micro-batch."""
    return run.gradient(targets)
