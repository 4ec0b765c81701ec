"""The schedule by hand arithmetic, what decay touches, clipping, and skipping a bad update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jgrpo.runtime.optimiser import all_finite, decay_mask, make_optimiser, make_schedule, select_tree
from model_port.errors import UserError


def rates(num_steps, **options):
    schedule = make_schedule(num_steps, learning_rate=2.0, **options)
    return [float(schedule(index)) for index in range(num_steps + 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [2, 2, 2, 2, 2]),
        ({"schedule": "linear"}, [2, 1.5, 1, 0.5, 0]),
        ({"schedule": "linear", "warmup_fraction": 0.5}, [1, 2, 2, 1, 0]),
        ({"schedule": "linear", "final_fraction": 0.5}, [2, 1.75, 1.5, 1.25, 1]),
        ({"schedule": "cosine"}, [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0]),
        ({"schedule": "constant", "warmup_fraction": 1.0}, [0.5, 1, 1.5, 2, 2]),
        ({"schedule": "constant", "warmup_fraction": 0.26}, [1, 2, 2, 2, 2]),
    ],
)
def test_schedule(options, expected):
    np.testing.assert_allclose(rates(4, **options), expected, atol=1e-6)


def test_decay_spares_scales_biases_and_vectors_even_when_stacked():
    params = {
        "layers": {
            "norm": {"scale": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))},
            "up": {"kernel": jnp.ones((2, 3, 5))},
        },
        "lora": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 3))},
        "up_conv": {"bias": jnp.ones((2, 7))},
        "vector": jnp.ones(3),
        "query": jnp.ones((1, 3, 5)),
    }
    assert decay_mask(params) == {
        "layers": {"norm": {"scale": False, "bias": False}, "up": {"kernel": True}},
        "lora": {"a": True, "b": True},
        "up_conv": {"bias": False},
        "vector": False,
        "query": True,
    }
    dotted = {"decoder.layers.norm.scale": jnp.ones((2, 3)), "decoder.layers.up.kernel": jnp.ones((2, 3, 5))}
    assert list(decay_mask(dotted).values()) == [False, True]


def test_first_update_of_adamw_by_hand():
    params = {"kernel": jnp.full((2, 2), 10.0), "bias": jnp.full((2,), 10.0)}
    optimiser = make_optimiser(10, learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=None, eps=0.0)
    updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, params), optimiser.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * (1 + 0.5 * 10), rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)


def test_clipping_acts_on_the_global_norm():
    """After two updates AdamW still knows how large the gradients were in proportion to each other."""

    def second_update(clip_norm, second):
        params = {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros((1,))}
        optimiser = make_optimiser(10, learning_rate=1.0, schedule="constant", clip_norm=clip_norm)
        state = optimiser.init(params)
        for gradient in ((3.0, 4.0), second):
            tree = {"kernel": jnp.full((1, 1), gradient[0]), "bias": jnp.full((1,), gradient[1])}
            updates, state = optimiser.update(tree, state, params)
        return float(updates["kernel"][0, 0]), float(updates["bias"][0])

    assert second_update(5.0, (30.0, 40.0)) == pytest.approx(second_update(None, (3.0, 4.0)), rel=1e-6)
    assert second_update(5.0, (30.0, 40.0)) != pytest.approx(second_update(None, (30.0, 40.0)), rel=1e-2)


def test_a_non_finite_gradient_leaves_nnx_state_and_optimiser_state_untouched():
    params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    optimiser = make_optimiser(10, learning_rate=0.1)

    @jax.jit
    def update(params, state, grads):
        updates, new_state = optimiser.update(grads, state, params)
        new_params = jax.tree.map(jnp.add, params, updates)
        good = all_finite(grads)
        return select_tree(good, (new_params, new_state), (params, state)), good

    state = optimiser.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    (params_1, state_1), good = update(params, state, ones)
    assert good and not jnp.array_equal(params_1["kernel"][...], params["kernel"][...])
    poisoned = jax.tree.map(lambda x: x.at[0].set(jnp.nan), ones)
    (params_2, state_2), good = update(params_1, state_1, poisoned)
    assert not good
    for old, new in zip(jax.tree.leaves((params_1, state_1)), jax.tree.leaves((params_2, state_2)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "schedule is 'cosin'; it must be one of cosine, linear, constant"),
        ({"warmup_fraction": 1.5}, "warmup_fraction is 1.5"),
        ({"final_fraction": -0.1}, "final_fraction is -0.1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_optimiser(10, **({"learning_rate": 0.1} | options))


def test_a_run_without_steps_is_refused():
    with pytest.raises(UserError, match="num_steps is 0"):
        make_schedule(0, learning_rate=0.1)
