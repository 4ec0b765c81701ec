# SPDX-License-Identifier: Apache-2.0
"""The adapter of a linear layer, and a fresh one on a whole model; loading merges or drops one (weights.convert)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model_port.config import LoraConfig
from model_port.errors import UserError
from model_port.layers import Linear, parameter, product


class LoRA(nnx.Module):
    """The low-rank update scaling * (x A) B of a linear layer. Source: PEFT LoraLayer, without dropout."""

    def __init__(
        self, in_size: int, out_size: int, *, axes, rank: int, scaling: float, rngs, stack=(), dtype=jnp.float32
    ):
        common = {"rngs": rngs, "stack": stack, "dtype": dtype}
        self.a = parameter((in_size, rank), (axes[0], None), init="normal", **common)
        self.b = parameter((rank, out_size), (None, axes[1]), init="zeros", **common)
        self.scaling = scaling

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        a, b = (matrix[...].astype(x.dtype) for matrix in (self.a, self.b))
        return product(product(x, a), b) * jnp.asarray(self.scaling, x.dtype)


def adapt(linear: Linear, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Give a linear layer, or a stack of them, a fresh adapter; B starts at zero, so nothing changes until training."""
    *stack, in_size, out_size = linear.kernel.shape
    adapter = LoRA(
        in_size,
        out_size,
        axes=linear.kernel.get_metadata("axes")[-2:],
        rank=config.rank,
        scaling=config.scaling,
        rngs=rngs,
        stack=tuple(stack),
        dtype=linear.kernel.dtype,
    )
    linear.lora = nnx.data(adapter)


def add_lora(model: Any, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Give a GraniteSpeech without an adapter a fresh one.

    Raises:
        UserError: the model has an adapter already.
    """
    if model.config.lora is not None:
        raise UserError(
            "the model already has an adapter; load it with lora='merge' or 'none' before adding a fresh one"
        )
    for room in (model.decoder.layers.self_attn, model.decoder.layers.mlp):
        for name, linear in vars(room).items():
            if name in config.target_modules:
                adapt(linear, config, rngs=rngs)
    model.config = dataclasses.replace(model.config, lora=config)
