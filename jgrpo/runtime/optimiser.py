# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule, AdamW, and what a jitted update needs to skip a bad step."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from model_port.errors import UserError

# Fraction of the way from the final learning rate up to the peak, by progress in [0, 1] through the decay.
SCHEDULES: dict[str, Callable] = {
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: jnp.ones_like(progress),
}

# Decay pulls a weight towards zero, which is not a neutral value for a norm scale and serves nothing for a bias. The
# name decides, not the rank: in stacked layers a scale is [layers, width].
UNDECAYED = ("scale", "bias")


def make_schedule(
    num_steps: int,
    *,
    learning_rate: float,
    warmup_fraction: float = 0.0,
    schedule: str = "cosine",
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Learning rate by update index 0 .. num_steps - 1: a linear warm-up, then the named decay.

    The warm-up of W = ceil(warmup_fraction * num_steps) updates gives learning_rate * (i + 1) / W, so that update 0
    already trains. The decay heads for learning_rate * final_fraction at index num_steps, one past the last update.

    Raises:
        UserError: for an unknown schedule or a number out of range.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; it must be at least 1")
    if not learning_rate >= 0:
        raise UserError(f"learning_rate is {learning_rate}; it must be 0 or more")
    if not 0 <= warmup_fraction <= 1:
        raise UserError(f"warmup_fraction is {warmup_fraction}; it must lie in [0, 1]")
    if not 0 <= final_fraction <= 1:
        raise UserError(f"final_fraction is {final_fraction}; it must lie in [0, 1]")
    warmup = math.ceil(warmup_fraction * num_steps)
    decay = SCHEDULES[schedule]

    def rate(index):
        index = jnp.asarray(index, jnp.float32)
        rise = jnp.minimum((index + 1.0) / max(warmup, 1), 1.0)
        progress = jnp.clip((index - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
        return learning_rate * rise * (final_fraction + (1.0 - final_fraction) * decay(progress))

    return rate


def make_optimiser(
    num_steps: int,
    *,
    learning_rate: float,
    warmup_fraction: float = 0.0,
    schedule: str = "cosine",
    final_fraction: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW under `make_schedule`, with the gradient clipped to a global norm of `clip_norm` (None: not clipped).

    Weight decay leaves norm scales, biases and every parameter of rank 0 or 1 alone.

    Raises:
        UserError: for a number out of range.
    """
    rate = make_schedule(
        num_steps,
        learning_rate=learning_rate,
        warmup_fraction=warmup_fraction,
        schedule=schedule,
        final_fraction=final_fraction,
    )
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise UserError(f"{name} is {beta}; it must lie in [0, 1)")
    if not weight_decay >= 0:
        raise UserError(f"weight_decay is {weight_decay}; it must be 0 or more")
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm is {clip_norm}; it must be above 0, or None for no clipping")
    adamw = optax.adamw(rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    return adamw if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def decay_mask(params: PyTree) -> PyTree:
    """The tree of `params` with true where weight decay applies."""

    def decays(path: tuple, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").rpartition(".")[2]
        return jnp.ndim(leaf) > 1 and name not in UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """True where no leaf holds a NaN or an infinity."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def select_tree(pred: Bool[Array, ""], a: PyTree, b: PyTree) -> PyTree:
    """Tree `a` where `pred` is true, else tree `b` of the same structure: a skipped update keeps every bit of the old.

    >>> import jax.numpy as jnp
    >>> select_tree(jnp.array(False), {"w": jnp.array([1.0])}, {"w": jnp.array([2.0])})["w"].tolist()
    [2.0]
    """
    return jax.tree.map(lambda x, y: jnp.where(pred, x, y), a, b)
