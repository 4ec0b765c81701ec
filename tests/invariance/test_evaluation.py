"""What a seed draws for an example depends on the two alone."""

import jax
import numpy as np

from jgrpo.evaluation.evaluate import example_keys
from jgrpo.rollout.scoring import step_keys
from tests.invariance.tiny import CONFIG, PROMPTS, G, P, make_batch

INDICES = np.arange(40, 40 + P)


def data(keys):
    return np.asarray(jax.random.key_data(keys))


def test_keys_depend_on_seed_and_example_alone():
    keys = data(example_keys((0, 1, 2), INDICES))
    assert keys.shape[:2] == (P, 3)
    assert len(np.unique(keys.reshape(P * 3, -1), axis=0)) == P * 3
    np.testing.assert_array_equal(data(example_keys((2, 0), INDICES[[5, 3]])), keys[[5, 3]][:, [2, 0]])


def test_evaluation_and_training_share_no_noise():
    """Not even one level down, where a training step's rows and an example's draws are folded in."""
    steps = [step_keys(0, step, num_prompts=8, num_samples=1)[:, 0] for step in INDICES.tolist()]
    rows = {tuple(key) for step in steps for key in data(step)}
    keys = example_keys((0,), INDICES)[:, 0]
    draws = {tuple(data(jax.random.fold_in(key, t))) for key in keys for t in range(8)}
    assert len(rows) == len(draws) == 8 * P and not rows & draws


def test_draws_do_not_depend_on_the_batch_or_on_other_seeds(run):
    first = np.asarray(run.rollout(keys=example_keys((0, 1, 2), INDICES)).tokens)
    order = np.array([3, 1, 4, 0, 5, 2, 7, 6])
    shuffled = make_batch(CONFIG, [PROMPTS[p] for p in order])
    second = np.asarray(run.rollout(shuffled, keys=example_keys((7, 2, 1), INDICES[order])).tokens)
    np.testing.assert_array_equal(second[:, 1], first[order, 2])
    np.testing.assert_array_equal(second[:, 2], first[order, 1])
    assert (second[:, 0] != first[order, 0]).any()
    assert G == 3
