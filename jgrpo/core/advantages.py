# SPDX-License-Identifier: Apache-2.0
"""Rewards of a group → advantages of its samples."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from model_port.errors import UserError

Array = jax.Array | np.ndarray

# Added to the standard deviation, as in TRL; it bounds the advantages of a group whose rewards barely differ.
STD_EPSILON = 1e-4
SCALES = ("group", "batch", "none")


def _namespace(x: Array):
    return np if isinstance(x, np.ndarray) else jnp


def zero_variance(rewards: Float[Array, "P G"]) -> Bool[Array, " P"]:
    """Groups whose rewards are all equal up to rounding, and which therefore teach nothing.

    The spread decides, not the mean: a group that scores 0.3 throughout is as uninformative as one that scores 0.

    >>> zero_variance(np.array([[0.3, 0.3, 0.3], [0.0, 0.0, 0.1]])).tolist()
    [True, False]
    """
    xp = _namespace(rewards)
    spread = xp.max(rewards, axis=1) - xp.min(rewards, axis=1)
    # Equal rewards may differ in their last bits when they are sums of parts added in another order.
    rounding = 8 * xp.finfo(rewards.dtype).eps * xp.max(xp.abs(rewards), axis=1)
    return spread <= rounding


def group_advantages(rewards: Float[Array, "P G"], scale: str = "group") -> Float[Array, "P G"]:
    """How much better each sample is than its group: (r - mean) / (std + 1e-4).

    Zero-variance groups get exactly 0. NumPy in, NumPy out; JAX in, JAX out.

    Args:
        scale: what divides r - mean. "group": the group's standard deviation (ddof 1); "batch": that of all
            P * G rewards (ddof 1); "none": 1, as in Dr. GRPO.

    Raises:
        UserError: unknown scale, or too few rewards for a standard deviation.

    Source: arXiv 2509.16990 eq. 1; ddof and the added constant as in TRL.

    >>> group_advantages(np.array([[0.0, 2.0]]), "none").tolist()
    [[-1.0, 1.0]]
    """
    if scale not in SCALES:
        raise UserError(f"advantage scale {scale!r} is unknown: use one of {', '.join(SCALES)}.")
    num_prompts, num_samples = rewards.shape
    if scale == "group" and num_samples < 2:
        raise UserError(
            f"advantages scaled by group need at least 2 samples per prompt, got {num_samples}: raise the group size "
            "or choose another scale."
        )
    if scale == "batch" and num_prompts * num_samples < 2:
        raise UserError("advantages scaled by batch need at least 2 rewards, got 1: raise the group size.")
    xp = _namespace(rewards)
    centred = rewards - xp.mean(rewards, axis=1, keepdims=True)
    if scale == "group":
        centred = centred / (xp.std(rewards, axis=1, ddof=1, keepdims=True) + STD_EPSILON)
    elif scale == "batch":
        centred = centred / (xp.std(rewards, ddof=1) + STD_EPSILON)
    return xp.where(zero_variance(rewards)[:, None], xp.zeros_like(centred), centred)
