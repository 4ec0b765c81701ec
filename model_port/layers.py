# SPDX-License-Identifier: Apache-2.0
"""The small parts every room of the model is built from: linear, norms, rotary positions, attention.

Every module takes `stack`, a tuple of leading sizes for its parameters: `(n,)` makes n layers at once, to be run by
`run_layers`. Each parameter carries its logical axes in the metadata `axes`; model_port.partition maps
them to a mesh.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

INIT_STDDEV = 0.02  # transformers PreTrainedModel.initializer_range
MASKED = -1e30  # a finite stand-in for -inf: a row with every key masked stays finite, in value and in gradient


# For what is cheaply computed from its arguments: the backward pass does so again instead of keeping what lies between,
# which costs memory, and the time to write and read it. In a scan prevent_cse is not needed, and would cost fusion.
recomputed = partial(jax.checkpoint, prevent_cse=False)


def parameter(
    shape: tuple[int, ...], axes: tuple, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype, init: str
) -> nnx.Param:
    """Create a parameter of shape `stack + shape`; `init` is normal, zeros or ones."""
    full = stack + shape
    if init == "normal":
        value = INIT_STDDEV * jax.random.normal(rngs.params(), full, jnp.float32)
    else:
        value = jnp.full(full, {"zeros": 0.0, "ones": 1.0}[init], jnp.float32)
    return nnx.Param(value.astype(dtype), axes=("layers",) * len(stack) + axes)


def align(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give a per-feature array leading axes of size 1, so that it combines with `x` by rank as well as by value."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: Float[Array, "..."], y: Float[Array, "..."], batch: int = 0, dtype: Any = None) -> Float[Array, "..."]:
    """Multiply x [*B, *N, I] by y [*B, I, *O], with `batch` axes B, to [*B, *N, *O]; in `dtype`, by default theirs.

    The gradient of y is a sum over N, for which XLA on CPUs turns round the left factor, together with all that it is
    computed from. JAX's own rule has the slope there; here it is the smaller of x and the slope, which takes a third
    off the update of a small model. Where matrices are multiplied either way round it makes no difference. A float32
    slope of bfloat16 factors is rounded to their dtype, as PyTorch does: matrix units want both factors in one.
    """
    shared = tuple(range(batch))
    return jax.lax.dot_general(x, y, (((x.ndim - 1,), (batch,)), (shared, shared)), preferred_element_type=dtype)


def _product_forward(x, y, batch, dtype):
    return product(x, y, batch, dtype), (x, y)


def _product_backward(batch, dtype, saved, slope):
    x, y = saved
    slope = slope.astype(x.dtype)
    shared, rows = tuple(range(batch)), tuple(range(batch, x.ndim - 1))
    columns = tuple(range(x.ndim - 1, slope.ndim)), tuple(range(batch + 1, y.ndim))
    dx = jax.lax.dot_general(slope, y, (columns, (shared, shared)))
    left, right = (x, slope) if x.size <= slope.size else (slope, x)
    dy = jax.lax.dot_general(left, right, ((rows, rows), (shared, shared)))
    if left is slope:
        dy = jnp.moveaxis(dy, -1, batch)
    return dx.astype(x.dtype), dy.astype(y.dtype)


product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(spec: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return jnp.einsum(spec, x, y) in float32; every letter of x and y stands in the other or in the result.

    Slopes are rounded as in `product`.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _contract_forward(spec, x, y):
    return contract(spec, x, y), (x, y)


def _contract_backward(spec, saved, slope):
    x, y = saved
    (left, right), out = spec.split("->")[0].split(","), spec.split("->")[1]
    f32 = {"preferred_element_type": jnp.float32}
    dx = jnp.einsum(f"{out},{right}->{left}", slope.astype(y.dtype), y, **f32)
    dy = jnp.einsum(f"{out},{left}->{right}", slope.astype(x.dtype), x, **f32)
    return dx.astype(x.dtype), dy.astype(y.dtype)


contract.defvjp(_contract_forward, _contract_backward)


class Linear(nnx.Module):
    """y = x W + b, and what an adapter under `lora` adds; the kernel is [in, out] or [in, parts, out]."""

    def __init__(self, in_size: int, out_size, *, axes: tuple, rngs, stack=(), dtype=jnp.float32, bias=True):
        out_shape = out_size if isinstance(out_size, tuple) else (out_size,)
        common = {"rngs": rngs, "stack": stack, "dtype": dtype}
        self.kernel = parameter((in_size, *out_shape), axes, init="normal", **common)
        self.bias = parameter(out_shape, axes[1:], init="zeros", **common) if bias else None
        self.lora = None

    def __call__(self, x: Float[Array, "*B I"], use_lora: bool = True) -> Float[Array, "..."]:
        y = product(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + align(self.bias[...].astype(x.dtype), y)
        if self.lora is not None and use_lora:
            y = y + self.lora(x)
        return y


class Embedding(nnx.Module):
    """A table of row vectors."""

    def __init__(self, rows: int, width: int, *, axes: tuple, rngs, stack=(), dtype=jnp.float32):
        self.embedding = parameter((rows, width), axes, rngs=rngs, stack=stack, dtype=dtype, init="normal")

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return jnp.take(self.embedding[...], ids, axis=0)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, *, eps: float, rngs, stack=(), dtype=jnp.float32):
        common = {"rngs": rngs, "stack": stack, "dtype": dtype}
        self.scale = parameter((width,), (None,), init="ones", **common)
        self.bias = parameter((width,), (None,), init="zeros", **common)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (y * align(scale, y) + align(bias, y)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation; the cast back comes before the scale. Source: transformers GraniteRMSNorm."""

    def __init__(self, width: int, *, eps: float, rngs, stack=(), dtype=jnp.float32):
        self.scale = parameter((width,), (None,), rngs=rngs, stack=stack, dtype=dtype, init="ones")
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return _root_mean_square(x, self.scale[...].astype(x.dtype), self.eps)


@partial(recomputed, static_argnums=2)
def _root_mean_square(x, scale, eps):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
    return align(scale, x) * y.astype(x.dtype)


def rotary(
    x: Float[Array, "P N H h"], cos_sin: tuple[Float[Array, "P N h"], Float[Array, "P N h"]]
) -> Float[Array, "P N H h"]:
    """Rotate the two halves of each head by position. Source: transformers apply_rotary_pos_emb."""
    cos, sin = (table[:, :, None, :].astype(x.dtype) for table in cos_sin)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def rotary_tables(positions: Int[Array, "P N"], *, theta: float, head_dim: int):
    """Return cos and sin [P, N, h] in float32 for the given positions."""
    inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None].astype(jnp.float32) * inverse[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


class Part(NamedTuple):
    """Keys and values that queries attend to: of each of G sequences, or without that axis one part for all of them.

    Attributes:
        mask: true where query n may look at key s.
    """

    keys: Float[Array, "P G S K h"] | Float[Array, "P S K h"]
    values: Float[Array, "P G S K h"] | Float[Array, "P S K h"]
    mask: Bool[Array, "#P #G #N S"]


def attend(q: Float[Array, "P G N H h"], *parts: Part, scale: float) -> Float[Array, "P G N H h"]:
    """Grouped-query attention of G sequences per prompt over shared keys and their own.

    The one attention of the decoder: prefill is G = 1, decoding N = 1, scoring and training N = T. A prompt's keys and
    values are stored and read once, whatever G; all parts share one softmax, computed in float32.
    """
    p, g, n, heads, width = q.shape
    kv_heads = parts[0].keys.shape[-2]
    q = q.reshape(p, g, n, kv_heads, heads // kv_heads, width)
    every = "pkrgns"  # order of all scores but a single token's: there the keys are larger, and must not be turned

    def spelled(part):
        own = part.keys.ndim == 5
        return ("pgkrns" if own and n == 1 else every), ("pgskh" if own else "pskh")

    def turn(x, order, wanted):
        return jnp.einsum(f"{order}->{wanted}", x)

    parts = [(part, *spelled(part)) for part in parts]
    scores, peaks, sums, out = [], [], [], 0.0
    for part, order, keys in parts:
        score = contract(f"pgnkrh,{keys}->{order}", q, part.keys) * scale
        mask = jnp.expand_dims(part.mask, [order.index(axis) for axis in "kr"])
        scores.append(jnp.where(mask, score, MASKED))
        peaks.append(turn(scores[-1].max(-1, keepdims=True), order, every))
    peak = jax.lax.stop_gradient(reduce(jnp.maximum, peaks))
    weights = [jnp.exp(score - turn(peak, every, order)) for score, (_, order, _) in zip(scores, parts, strict=True)]
    for weight, (_, order, _) in zip(weights, parts, strict=True):
        sums.append(turn(weight.sum(-1, keepdims=True), order, every))
    total = sum(sums)
    for weight, (part, order, keys) in zip(weights, parts, strict=True):
        share = (weight / turn(total, every, order)).astype(q.dtype)
        out = out + contract(f"{order},{keys}->pgnkrh", share, part.values)
    return out.astype(q.dtype).reshape(p, g, n, heads, width)


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_layers(layers: Any, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry, xs, *, remat: str = "none"):
    """Run `body(layer, carry, x) -> (carry, y)` over all layers; return the last carry and every y.

    Args:
        layers: a module of stacked layers, which are scanned, so that compile time does not grow with depth; `xs` and
            the ys are then stacked, too. Or what `unstack` makes of it, which runs layer by layer; `xs` and the ys are
            then lists.
        remat: what the backward pass of a scan recomputes besides `recomputed`: none, dots (keeps matrix products) or
            full.
    """
    if isinstance(layers, list):
        ys = []
        for layer, x in zip(layers, xs, strict=True):
            carry, y = body(layer, carry, x)
            ys.append(y)
        return carry, ys
    graph, state = nnx.split(layers)

    def step(carry, layer_and_x):
        layer_state, x = layer_and_x
        return body(nnx.merge(graph, layer_state), carry, x)

    if REMAT[remat] is not None:
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (state, xs))


def unstack(stacked: Any) -> list[Any]:
    """Return the layers of a stacked module, or of a tree of stacked arrays, one by one."""
    if isinstance(stacked, nnx.Module):
        graph, state = nnx.split(stacked)
        return [nnx.merge(graph, layer) for layer in unstack(state)]
    leaves, structure = jax.tree.flatten(stacked)
    return [structure.unflatten(layer) for layer in zip(*leaves, strict=True)]
