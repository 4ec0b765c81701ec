"""Products with gradient rules of their own, against JAX's rule and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.workload import Size, plan
from jgrpo.planning.programs import calls
from model_port.layers import contract, product

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


@pytest.mark.parametrize(
    "spec", ["pgnkrh,pskh->pkrgns", "pgkrns,pgskh->pgnkrh", "bnchd,crd->bnhcr", "bhqw,bwhd->bqhd"], ids=str
)
def test_contract_and_its_gradients_are_einsums_in_float64(spec):
    names, out = spec.split("->")
    sizes = {letter: 2 + place for place, letter in enumerate(sorted(set(names) - {","}))}
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=[sizes[letter] for letter in name]) for name in names.split(","))
    slope = rng.normal(size=[sizes[letter] for letter in out])
    value, back = jax.vjp(lambda x, y: contract(spec, x, y), *(jnp.asarray(part, jnp.float32) for part in (x, y)))
    np.testing.assert_allclose(value, np.einsum(spec, x, y), rtol=1e-4, atol=1e-4)
    left, right = names.split(",")
    dx, dy = back(jnp.asarray(slope, jnp.float32))
    np.testing.assert_allclose(dx, np.einsum(f"{out},{right}->{left}", slope, y), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dy, np.einsum(f"{out},{left}->{right}", slope, x), rtol=1e-4, atol=1e-4)


def dots(jaxpr):
    """All matrix products of a jaxpr, those inside its loops and remats too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from dots(getattr(inner, "jaxpr", inner))


def test_every_product_of_a_bfloat16_step_has_bfloat16_factors():
    """A float32 factor makes a matrix unit compute in float32, at a fraction of its rate."""
    run, clip = plan(Size(model="tiny", dtype="bfloat16", prompts=2, samples=2, seconds=2.0, new_tokens=4))
    for call in calls(run, clip):
        if call.name in ("rollout", "score", "update"):
            with jax.set_mesh(run.mesh):
                found = list(dots(call.program.trace(*call.arguments, **call.options).jaxpr.jaxpr))
            factors = [tuple(str(operand.aval.dtype) for operand in each.invars) for each in found]
            assert len(factors) > 20 and set(factors) == {("bfloat16", "bfloat16")}, call.name
