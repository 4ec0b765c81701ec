"""Parity with transformers in float32: every comparison is measured, and the summary names the worst of each kind."""

import jax
import numpy as np
import pytest

from tests.parity.pairs import LORA, PLUS, UNTIED, make_pair

# The port promises 1e-4. Ten times less is what tells a wrong epsilon from rounding, and is met with room to spare.
TOLERANCE = 1e-5
ERRORS = pytest.StashKey[dict[str, tuple[float, float]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Start without measurements."""
    config.stash[ERRORS] = {}


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Accelerators would multiply in fewer bits than float32 has."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def close(request, record_property):
    """Assert that two arrays are equal within the tolerance, and remember the largest error under a name."""
    measured = request.config.stash[ERRORS]

    def check(name, ours, theirs, tolerance=TOLERANCE):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape and ours.size
        error = float(np.abs(ours - theirs).max())
        measured[name] = max(measured.get(name, (0.0, 0.0)), (error, float(np.abs(theirs).max())))
        record_property(name, error)
        assert error <= tolerance, f"{name}: largest error {error:.2e}, allowed {tolerance:.0e}"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the largest absolute errors; docs/parity.md states them."""
    measured = terminalreporter.config.stash[ERRORS]
    if measured:
        terminalreporter.section("largest absolute errors against transformers, float32")
        for name, (error, scale) in sorted(measured.items()):
            terminalreporter.line(f"{name:42s} {error:.1e}  of values up to {scale:.1f}")


@pytest.fixture(scope="session")
def lora(tmp_path_factory):
    """(transformers model, our model): tied head, adapter on q_proj and v_proj."""
    return make_pair(LORA, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    """(transformers model, our model): a head of its own, adapters on all linear layers."""
    return make_pair(UNTIED, tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def plus(tmp_path_factory):
    """(transformers model, our model): granite_speech_plus, which concatenates encoder layers."""
    return make_pair(PLUS, tmp_path_factory.mktemp("plus"))
