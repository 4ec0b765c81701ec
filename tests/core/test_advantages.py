import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.core.advantages import group_advantages, zero_variance
from model_port.errors import UserError


def test_group_scale_by_hand():
    # mean 2, deviations -1 0 1, sum of squares 2, ddof 1: std 1.
    out = group_advantages(np.array([[1.0, 2.0, 3.0]]))
    np.testing.assert_allclose(out, np.array([[-1.0, 0.0, 1.0]]) / 1.0001, rtol=1e-12)


def test_reference_answer_in_a_group_of_eight():
    # The reference scores 1, the other seven 0: A_ref = (G - 1) / sqrt(G), A_on = -1 / sqrt(G).
    out = group_advantages(np.array([[1.0] + [0.0] * 7]))
    assert out[0, 0] == pytest.approx(7 / 8**0.5, rel=1e-3) and round(out[0, 0], 2) == 2.47
    np.testing.assert_allclose(out[0, 1:], -(8**-0.5), rtol=1e-3)
    # Without the added constant: the values the paper's equation gives.
    exact = out * (np.std([1.0] + [0.0] * 7, ddof=1) + 1e-4) / np.std([1.0] + [0.0] * 7, ddof=1)
    assert exact[0].round(3).tolist() == [2.475] + [-0.354] * 7


def test_each_group_is_divided_by_its_own_deviation():
    rewards = np.array([[0.0, 0.01, 0.02], [0.0, 0.5, 1.0]])
    out = group_advantages(rewards)
    np.testing.assert_allclose(out[0], [-0.01 / 0.0101, 0.0, 0.01 / 0.0101], rtol=1e-12)
    np.testing.assert_allclose(out[1], [-0.5 / 0.5001, 0.0, 0.5 / 0.5001], rtol=1e-12)


def test_batch_scale_by_hand():
    # Centred -1 1 | -2 2; all rewards 0 2 0 4: mean 1.5, sum of squares 11, ddof 1: std sqrt(11 / 3).
    out = group_advantages(np.array([[0.0, 2.0], [0.0, 4.0]]), "batch")
    np.testing.assert_allclose(out, np.array([[-1.0, 1.0], [-2.0, 2.0]]) / ((11 / 3) ** 0.5 + 1e-4), rtol=1e-12)


def test_no_scale_by_hand():
    np.testing.assert_allclose(group_advantages(np.array([[0.0, 2.0], [0.0, 4.0]]), "none"), [[-1.0, 1.0], [-2.0, 2.0]])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("samples", [3, 7, 11])
def test_equal_rewards_give_exactly_zero(scale, value, samples):
    # 0.1 * 3 / 3 is not 0.1 in binary: subtracting the mean alone would leave about 1e-17.
    rewards = np.full((2, samples), value)
    rewards[1, 0] = 0.7
    for out in (group_advantages(rewards, scale), group_advantages(jnp.asarray(rewards, jnp.float32), scale)):
        assert np.all(np.asarray(out[0]) == 0.0)
        assert np.all(np.asarray(out[1]) != 0.0)


def test_rewards_equal_up_to_rounding_give_exactly_zero():
    rewards = np.array([[0.1 + 0.2, 0.3, 0.3]])
    assert rewards[0, 0] != rewards[0, 1]
    assert zero_variance(rewards).tolist() == [True]
    assert group_advantages(rewards).tolist() == [[0.0, 0.0, 0.0]]


def test_zero_variance_looks_at_spread_not_at_the_mean():
    rewards = np.array([[0.4, 0.4, 0.4], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0], [0.4, 0.4, 0.4001]])
    assert zero_variance(rewards).tolist() == [True, True, False, False]
    assert zero_variance(jnp.asarray(rewards, jnp.float32)).tolist() == [True, True, False, False]


def test_numpy_and_jax_agree_also_under_jit():
    rewards = np.random.default_rng(0).random((5, 7))
    for scale in ("group", "batch", "none"):
        host = group_advantages(rewards, scale)
        device = jax.jit(group_advantages, static_argnums=1)(jnp.asarray(rewards, jnp.float32), scale)
        assert isinstance(host, np.ndarray) and isinstance(device, jax.Array)
        np.testing.assert_allclose(device, host, rtol=1e-4, atol=1e-6)


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match="at least 2 samples per prompt, got 1"):
        group_advantages(np.ones((3, 1)))
    with pytest.raises(UserError, match="at least 2 rewards"):
        group_advantages(np.ones((1, 1)), "batch")
    assert group_advantages(np.ones((3, 1)), "none").tolist() == [[0.0], [0.0], [0.0]]


def test_unknown_scale_lists_the_scales():
    with pytest.raises(UserError, match="'std' is unknown: use one of group, batch, none"):
        group_advantages(np.ones((3, 2)), "std")
