"""The product with a gradient rule of its own, against JAX's rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model_port.layers import product

SHAPES = {
    "narrow to wide": ((2, 5, 3), (3, 7), 0),
    "wide to narrow": ((2, 5, 7), (7, 3), 0),
    "two axes of columns": ((2, 5, 3), (3, 2, 4), 0),
    "a vector": ((3,), (3, 4), 0),
    "a batch, few rows": ((2, 3, 4, 5), (2, 3, 5, 6), 2),
    "a batch, many rows": ((2, 3, 4, 9), (2, 3, 9, 2), 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradients_are_those_of_jax(name):
    x_shape, y_shape, batch = SHAPES[name]
    random = np.random.default_rng(0)
    x, y = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in (x_shape, y_shape))
    shared = tuple(range(batch))

    def plain(x, y):
        return jax.lax.dot_general(x, y, (((x.ndim - 1,), (batch,)), (shared, shared)))

    slope = jnp.asarray(random.normal(size=plain(x, y).shape), jnp.float32)
    value, back = jax.vjp(lambda x, y: product(x, y, batch), x, y)
    wanted, wanted_back = jax.vjp(plain, x, y)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for ours, theirs in zip(back(slope), wanted_back(slope), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_product_in_float32_of_bfloat16_gives_gradients_in_bfloat16():
    x, y = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    value, back = jax.vjp(lambda x, y: product(x, y, 0, jnp.float32), x, y)
    assert value.dtype == jnp.float32
    assert [gradient.dtype for gradient in back(jnp.ones_like(value))] == [jnp.bfloat16, jnp.bfloat16]


def test_nothing_is_computed_for_a_frozen_factor():
    x, y = jnp.ones((64, 32)), jnp.ones((32, 16))

    def flops(of):
        return jax.jit(jax.grad(lambda x, y: product(x, y).sum(), of)).lower(x, y).compile().cost_analysis()["flops"]

    assert flops(0) < flops((0, 1))
