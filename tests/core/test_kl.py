import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.core.kl import ESTIMATORS, kl_estimate
from model_port.errors import UserError

POLICY = np.array([0.5, 0.3, 0.15, 0.05])
REFERENCE = np.array([0.25, 0.25, 0.4, 0.1])


def test_values_by_hand():
    # pi 1/2, pi_ref 1/4: d = -ln 2.
    ln2 = np.log(2.0)
    logp, ref = jnp.float32(np.log(0.5)), jnp.float32(np.log(0.25))
    np.testing.assert_allclose(kl_estimate(logp, ref, kind="k1"), ln2, rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logp, ref, kind="k2"), ln2**2 / 2, rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logp, ref, kind="k3"), 0.5 + ln2 - 1, rtol=1e-6)


@pytest.mark.parametrize("kind", list(ESTIMATORS))
def test_equal_policies_have_no_divergence(kind):
    logp = jnp.array([-0.1, -3.0, -20.0])
    assert kl_estimate(logp, logp, kind=kind).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased(kind):
    # The expectation over the vocabulary is a finite sum, so no sampling is needed.
    with jax.enable_x64(True):
        value = np.asarray(kl_estimate(jnp.log(POLICY), jnp.log(REFERENCE), kind=kind))
    np.testing.assert_allclose(np.sum(POLICY * value), np.sum(POLICY * np.log(POLICY / REFERENCE)), rtol=1e-12)


def test_k3_is_never_negative_and_varies_less_than_k1():
    with jax.enable_x64(True):
        k1, k3 = (np.asarray(kl_estimate(jnp.log(POLICY), jnp.log(REFERENCE), kind=kind)) for kind in ("k1", "k3"))

    def variance(x):
        return np.sum(POLICY * x**2) - np.sum(POLICY * x) ** 2

    assert np.all(k3 >= 0) and np.any(k1 < 0) and variance(k3) < variance(k1)


def test_expected_gradients_as_documented():
    with jax.enable_x64(True):
        scores = jnp.log(POLICY)

        def expected(kind):
            # As in training: the tokens are sampled, so their probabilities are constants of the gradient.
            return jax.grad(
                lambda s: jnp.sum(POLICY * kl_estimate(jax.nn.log_softmax(s), jnp.log(REFERENCE), kind=kind))
            )(scores)

        def forward(s):
            return jnp.sum(REFERENCE * (jnp.log(REFERENCE) - jax.nn.log_softmax(s)))

        def reverse(s):
            return jnp.sum(jax.nn.softmax(s) * (jax.nn.log_softmax(s) - jnp.log(REFERENCE)))

        np.testing.assert_allclose(expected("k1"), 0.0, atol=1e-15)
        np.testing.assert_allclose(expected("k2"), jax.grad(reverse)(scores), rtol=1e-12)
        np.testing.assert_allclose(expected("k3"), jax.grad(forward)(scores), rtol=1e-12)


def test_unknown_estimator_lists_the_estimators():
    with pytest.raises(UserError, match="'k4' is unknown: use one of k1, k2, k3"):
        kl_estimate(jnp.zeros(2), jnp.zeros(2), kind="k4")
