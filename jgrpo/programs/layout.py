# SPDX-License-Identifier: Apache-2.0
"""How a rollout decodes: weights gathered over fsdp or stationary, layers scanned or unrolled, the cache's dtype."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from model_port.decoder import unrolled_on
from model_port.params import ModelDef, Params
from model_port.partition import ROLLOUT, param_shardings
from model_port.weights.tree import abstract_model

# What a matrix product or a lookup reads, in the dtype of the activations; norms are computed in float32.
CAST_WHERE_USED = ("kernel", "embedding", "a", "b")
# Of the memory that training leaves free, the share that a gathered copy may take; keys, values and activations of the
# rollout need the rest.
FREE_SHARE = 0.5


def rollout_layout(definition: ModelDef, mesh: Mesh, weights: str) -> Callable[..., tuple[Params, ...]]:
    """Return what lays (params, frozen) out for decoding; `weights` is a key of partition.ROLLOUT.

    What lies right already, in the right dtype, is handed on as it is, and so is the encoder, which no rollout runs.
    """
    shardings, dtype = _shardings(definition, mesh, weights), jnp.dtype(definition.skeleton().dtype)

    def stays(name: str, value: jax.Array) -> bool:
        same = value.sharding.is_equivalent_to(shardings[name], value.ndim)
        return name.startswith("encoder.") or (same and value.dtype == rollout_dtype(name, value.dtype, dtype))

    # One by one: a program that moved all of them would need the memory of all of them once more.
    @functools.partial(jax.jit, static_argnums=0)
    def move(name: str, value: jax.Array) -> jax.Array:
        cast = value.astype(rollout_dtype(name, value.dtype, dtype))
        return jax.lax.with_sharding_constraint(cast, shardings[name])

    def layout(*parts: Params) -> tuple[Params, ...]:
        return tuple(
            {name: value if stays(name, value) else move(name, value) for name, value in part.items()} for part in parts
        )

    return layout


def decoding_options(mesh: Mesh, *, weights: str, layers: str, cache: str) -> dict[str, Any]:
    """Return the options of model_port's sample_completions and search_completions for a mesh.

    Args:
        weights: a key of partition.ROLLOUT.
        layers: scanned, unrolled, or auto.
        cache: dtype of keys and values, or auto, which is that of the computation.
    """
    return {
        "stationary": weights == "stationary",
        "unrolled": decodes_unrolled(mesh, layers),
        "cache_dtype": None if cache == "auto" else jnp.dtype(cache),
    }


def decodes_unrolled(mesh: Mesh, layers: str) -> bool:
    """Return whether layers are unrolled: as the option says, or where it is auto, as is faster on these devices."""
    return unrolled_on(mesh.devices.flat[0].platform) if layers == "auto" else layers == "unrolled"


def rollout_dtype(name: str, stored: Any, computed: Any) -> Any:
    """Return the dtype of a parameter in the rollout: where each use casts it anyway, it may be cast before."""
    return computed if name.split(".")[-1] in CAST_WHERE_USED else stored


def choose_weights(
    option: str,
    shapes: Mapping[str, jax.ShapeDtypeStruct | jax.Array],
    definition: ModelDef,
    mesh: Mesh,
    *,
    memory: int | None,
    unrolled: bool = False,
) -> tuple[str, str]:
    """Return how weights lie in the rollout, gathered or stationary, and a line that says why.

    Args:
        option: auto, gathered or stationary.
        shapes: every parameter of the model, with the dtype it has in training.
        memory: bytes of a device; None where that is unknown, as on a CPU.
        unrolled: whether the layers are; then a gathered copy stands in memory twice, stacked and layer by layer.
    """
    dtype = jnp.dtype(definition.skeleton().dtype)

    def on_a_device(layout: str, chosen: Mapping[str, Any]) -> int:
        shardings = _shardings(definition, mesh, layout)
        return sum(_bytes(leaf, shardings[name]) for name, leaf in chosen.items())

    used = {
        name: jax.ShapeDtypeStruct(leaf.shape, rollout_dtype(name, leaf.dtype, dtype))
        for name, leaf in shapes.items()
        if not name.startswith("encoder.")
    }
    gathered, resident = on_a_device("gathered", used), on_a_device("stationary", shapes)
    size = f"{gathered / 1e9:.2f} GB a device"
    if mesh.shape["fsdp"] == 1:
        return "gathered", f"rollout weights: as in training, {size}"
    if option != "auto":
        return option, f"rollout weights: {option}, as configured; gathered they take {size}"
    if memory is None or gathered * (1 + unrolled) <= FREE_SHARE * (memory - resident):
        return "gathered", f"rollout weights: gathered once per rollout, {size}"
    return "stationary", (
        f"rollout weights: stationary; gathered they take {size}{', twice' * unrolled}, more than "
        f"{FREE_SHARE:.0%} of the {(memory - resident) / 1e9:.2f} GB that training leaves"
    )


def _shardings(definition: ModelDef, mesh: Mesh, weights: str) -> dict[str, NamedSharding]:
    model = abstract_model(definition.skeleton().config)
    return param_shardings(nnx.state(model), mesh, ROLLOUT[weights])


def _bytes(leaf: jax.ShapeDtypeStruct | jax.Array, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
