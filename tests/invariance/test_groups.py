"""What happens to groups between device and update, as host arrays."""

import jax
import numpy as np

from jgrpo.config import GRPOOptions
from jgrpo.rewards import make_reward
from jgrpo.rollout.scoring import fill_groups, learnt_tokens, score_groups, step_keys
from tests.invariance.tiny import G, P


def table(indices, rewards):
    indices, rewards = np.array(indices), np.array(rewards, float)
    return {"indices": indices, "rewards": rewards, "tokens": np.repeat(indices, 2 * 3).reshape(-1, 2, 3)}


def test_groups_with_spread_replace_those_without():
    groups = table([10, 11, 12, 13], [[0, 0], [0, 1], [0.3, 0.3], [1, 1]])
    # 11 is held already, 21 teaches nothing, 22 may come only once.
    found = table([11, 20, 21, 22, 22], [[0, 1], [1, 0], [1, 1], [0, 0.5], [0.5, 0]])
    before = {name: values.copy() for name, values in groups.items()}
    filled, count = fill_groups(groups, found)
    assert count == 2 and filled["indices"].tolist() == [20, 11, 22, 13]
    assert filled["rewards"].tolist() == [[1, 0], [0, 1], [0, 0.5], [1, 1]]
    assert (filled["tokens"] == filled["indices"][:, None, None]).all()
    # A prompt that is itself without spread is no replacement for another, even if it has some this time.
    assert fill_groups(groups, table([12, 13], [[0, 1], [0, 1]]))[1] == 0
    # More than is needed is left.
    filled, count = fill_groups(filled, table([30, 31], [[0, 1], [0, 1]]))
    assert count == 1 and filled["indices"].tolist() == [20, 11, 22, 30]
    assert fill_groups(filled, found)[1] == 0
    for name, values in groups.items():
        np.testing.assert_array_equal(values, before[name])


def test_further_rollouts_of_a_step_have_noise_of_their_own():
    keys = [step_keys(0, step, num_prompts=P, num_samples=G, round=round) for step in range(3) for round in range(4)]
    # One level down, too, where the position of each draw is folded in.
    draws = [jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(some, t) for some in keys for t in range(3)]
    data = np.concatenate([np.asarray(jax.random.key_data(some)).reshape(P * G, -1) for some in [*keys, *draws]])
    assert len(np.unique(data, axis=0)) == len(data) == 48 * P * G


def test_what_is_left_out_of_the_loss():
    mask = np.ones((3, 2, 4), bool)
    mask[0, 0, 2:] = False
    eos = np.array([[True, False], [True, True], [False, False]])
    rewards = np.array([[0, 1], [0.5, 0.5], [0, 1]])
    for truncated, zero, kept in (
        (False, False, [[1, 1], [1, 1], [1, 1]]),
        (True, False, [[1, 0], [1, 1], [0, 0]]),
        (False, True, [[1, 1], [0, 0], [1, 1]]),
        (True, True, [[1, 0], [0, 0], [0, 0]]),
    ):
        options = GRPOOptions(mask_truncated=truncated, filter_zero_variance=zero)
        expected = mask & np.array(kept, bool)[:, :, None]
        np.testing.assert_array_equal(learnt_tokens(mask, eos, rewards, options), expected)


def test_the_overlong_penalty_is_a_component_of_the_total():
    reward = make_reward({"exact": 2.0})
    components = {"exact": np.array([[1.0, 0.0]])}
    lengths = np.array([[9, 10]])
    total, named = score_groups(reward, components, lengths, GRPOOptions(), limit=10)
    assert total.tolist() == [[2.0, 0.0]] and named.keys() == {"exact"}
    options = GRPOOptions(overlong_buffer=4, overlong_penalty=0.5)
    total, named = score_groups(reward, components, lengths, options, limit=10)
    np.testing.assert_allclose(named["overlong"], [[-0.375, -0.5]])
    np.testing.assert_allclose(total, [[2 - 0.375, -0.5]])
