# SPDX-License-Identifier: Apache-2.0
"""The GRPO family of losses, as a per-token loss and the weights that add it up.

    loss = sum(token_weights(mask) * token_loss(...))

The weights depend on the mask only. Computed once for the whole batch and sliced with it, they make the gradient the
same for any number of micro-batches and any mesh: the pieces are added, never averaged.

Off-policy rows are completions that were not sampled: the reference answers of mixed-policy GRPO. They count in the
loss and in what it is divided by like any other; metrics of the importance ratio are about sampled tokens only.

P prompts, G samples per prompt, T completion tokens. The mask is true up to and including the end-of-sequence token.
What the other arrays hold at masked positions is never read: NaN and infinities there reach neither loss nor gradient.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jgrpo.core.kl import kl_estimate
from model_port.errors import UserError

Array = jax.Array | np.ndarray
Tokens = Float[jax.Array, "P G T"]
Scalar = Float[jax.Array, ""]


def _count(mask: Bool[Array, "P G T"], axis: int | None = None) -> Float[jax.Array, "#P #G 1"]:
    """How many positions are true, along an axis or in all; at least 1, as it divides."""
    return jnp.maximum(jnp.sum(mask, axis=axis, keepdims=True), 1).astype(float)


def _num_sequences(mask: Bool[Array, "P G T"], *, skip_empty_groups: bool) -> Float[jax.Array, "#P #G #T"]:
    """P G, or as many as there are in groups where a token counts."""
    groups = jnp.any(mask, axis=(1, 2), keepdims=True) if skip_empty_groups else jnp.ones((mask.shape[0], 1, 1), bool)
    return _count(groups) * mask.shape[1]


# An infinite ratio would have a NaN for a gradient also where it is clipped; e^80 is far beyond any bound.
MAX_LOG_RATIO = 80.0
# Of the per-token metrics, those that are means over sampled tokens; the others are means over all.
ON_POLICY_METRICS = ("ratio", "clip_low", "clip_high", "clip_delta", "clip_region")


def _chosen(table: Mapping[str, Any], what: str, name: str) -> Any:
    if name not in table:
        raise UserError(f"{what} {name!r} is unknown: use one of {', '.join(table)}.")
    return table[name]


def token_weights(
    mask: Bool[Array, "P G T"],
    *,
    loss_type: str,
    max_completion_length: int | None = None,
    skip_empty_groups: bool = False,
) -> Tokens:
    """The weight of every token in the loss; 0 where masked.

    | loss type   | weight of a token of sequence i                                                        |
    |-------------|----------------------------------------------------------------------------------------|
    | grpo        | 1 / (P G len_i): mean over sequences of the sequence mean; empty sequences count as 0  |
    | dapo, cispo | 1 / sum_j len_j: mean over the tokens of the whole batch                               |
    | bnpo        | the same over the arrays given: call it on each micro-batch, and divide by their count |
    | dr_grpo     | 1 / (P G max_completion_length): independent of the lengths                            |

    Args:
        skip_empty_groups: whether P is the number of groups in which a token counts, rather than of all.

    Raises:
        UserError: unknown loss type, or dr_grpo without a max_completion_length.

    >>> token_weights(jnp.array([[[True, True, True], [True, False, False]]]), loss_type="dapo").tolist()
    [[[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]]
    """
    _, divide = _chosen(LOSSES, "loss type", loss_type)
    sequences = _num_sequences(mask, skip_empty_groups=skip_empty_groups)
    return jnp.where(mask, 1.0 / divide(mask, sequences, max_completion_length), 0.0)


def _by_token(mask: Bool[Array, "P G T"], sequences: Float[jax.Array, "..."], limit: int | None):
    """Every token of the arrays counts alike."""
    return _count(mask)


def _by_sequence(mask: Bool[Array, "P G T"], sequences: Float[jax.Array, "..."], limit: int | None):
    """Every sequence counts alike, whatever its length."""
    return sequences * _count(mask, axis=-1)


def _by_limit(mask: Bool[Array, "P G T"], sequences: Float[jax.Array, "..."], limit: int | None):
    """Every token counts as one of a sequence of the greatest length."""
    if limit is None or limit < 1:
        raise UserError(
            f"loss type dr_grpo divides by the maximum completion length, got {limit}: "
            "give a positive max_completion_length."
        )
    return sequences * limit


def _token_ratio(log_ratio: Tokens, logp: Tokens, mask: Bool[Array, "P G T"]) -> Tokens:
    """pi_theta / pi_old of each token."""
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def _sequence_ratio(log_ratio: Tokens, logp: Tokens, mask: Bool[Array, "P G T"]) -> Tokens:
    """The sequence's geometric mean of it, spread over its tokens."""
    mean = jnp.sum(log_ratio, axis=-1, keepdims=True) / _count(mask, axis=-1)
    ratio = jnp.exp(jnp.minimum(mean, MAX_LOG_RATIO))
    return jax.lax.stop_gradient(ratio) * jnp.exp(logp - jax.lax.stop_gradient(logp))


def _shaped(ratio: Tokens, off_policy: Bool[jax.Array, "P G T"], *, gamma: float | int) -> Tokens:
    """x / (x + gamma) in place of an off-policy token's ratio x: tokens the policy finds unlikely learn faster."""
    return jnp.where(off_policy, ratio / (ratio + gamma), ratio)


def _clipped(
    ratio: Tokens,
    logp: Tokens,
    advantage: Tokens,
    on_policy: Bool[jax.Array, "P G T"],
    *,
    epsilon_low: float | int,
    epsilon_high: float | int,
    delta: float | int | None,
) -> tuple[Tokens, dict[str, Bool[jax.Array, "P G T"]]]:
    """min(min(ratio, delta) A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A), and where each bound holds.

    The minimum takes a clip bound only on the side where going on would still pay: above for A > 0, below for A < 0.
    That leaves a growing ratio unbounded for A < 0 alone, which is where delta binds.
    """
    bounds = {
        "clip_low": (on_policy & (advantage < 0) & (ratio < 1 - epsilon_low), 1 - epsilon_low),
        "clip_high": (on_policy & (advantage > 0) & (ratio > 1 + epsilon_high), 1 + epsilon_high),
    }
    if delta is not None:
        bounds["clip_delta"] = (on_policy & (advantage < 0) & (ratio > delta), delta)
    bounded = ratio
    for holds, bound in bounds.values():
        bounded = jnp.where(holds, bound, bounded)
    return bounded * advantage, {name: holds for name, (holds, _) in bounds.items()}


def _truncated(
    ratio: Tokens,
    logp: Tokens,
    advantage: Tokens,
    on_policy: Bool[jax.Array, "P G T"],
    *,
    epsilon_high: float | int,
    **unused: float | int | None,
) -> tuple[Tokens, dict[str, Bool[jax.Array, "P G T"]]]:
    """stop_gradient(min(ratio, epsilon_high)) A log pi, and where the weight is truncated (never from below)."""
    high = on_policy & (ratio > epsilon_high)
    weight = jax.lax.stop_gradient(jnp.where(high, epsilon_high, ratio))
    return weight * advantage * logp, {"clip_low": jnp.zeros_like(high), "clip_high": high}


# A loss is the surrogate of a token and what its weight divides by. A new one is one entry here.
LOSSES = {
    "grpo": (_clipped, _by_sequence),
    "dapo": (_clipped, _by_token),
    "bnpo": (_clipped, _by_token),
    "dr_grpo": (_clipped, _by_limit),
    "cispo": (_truncated, _by_token),
}
IMPORTANCE = {"token": _token_ratio, "sequence": _sequence_ratio}


def _check_delta(delta: float | int | None, *, loss_type: str, epsilon_high: float | int) -> None:
    if delta is None:
        return
    if loss_type == "cispo":
        raise UserError(f"delta is {delta}, but cispo bounds the ratio by epsilon_high alone: set delta to None.")
    if delta <= 1 + epsilon_high:
        raise UserError(
            f"delta is {delta}; as a bound beyond the clip it must be above 1 + epsilon_high = {1 + epsilon_high}."
        )


def token_loss(
    logp: Float[Array, "P G T"],
    old_logp: Float[Array, "P G T"],
    ref_logp: Float[Array, "P G T"] | None,
    advantage: Float[Array, "P G"],
    mask: Bool[Array, "P G T"],
    is_off_policy: Bool[Array, "P G"] | None = None,
    *,
    loss_type: str = "dapo",
    epsilon_low: float | int = 0.2,
    epsilon_high: float | int = 0.2,
    beta: float | int = 0.02,
    kl: str = "k3",
    importance: str = "token",
    delta: float | int | None = None,
    off_policy_shaping: float | int = 0.0,
) -> tuple[Tokens, dict[str, Tokens]]:
    """Loss of every token, -surrogate + beta * KL, and per-token metrics; both 0 where masked.

    grpo, dapo, bnpo, dr_grpo:  surrogate = min(min(ratio, delta) A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A)
    cispo:                      surrogate = stop_gradient(min(ratio, epsilon_high)) A logp

    In cispo epsilon_high is itself the bound on the ratio, not its distance from 1: values near 5 are usual.

    Args:
        old_logp: under the policy that sampled; constant in the gradient.
        ref_logp: under the reference policy; constant in the gradient. May be None when beta is 0.
        is_off_policy: rows that were not sampled (mixed-policy GRPO): their behaviour policy is taken as
            pi_phi = 1, so ratio = pi_theta, and neither clip nor delta applies. Their old_logp is not read. The KL
            term applies to them as to every row.
        importance: "token": ratio = exp(logp - old_logp). "sequence" (GSPO, in its token form): the value is
            s = exp(mean over the sequence's tokens of logp - old_logp) at every token, the gradient is
            s * grad logp of that token. As all weights are equal within a sequence, the gradient of the loss is
            that of the sequence form too. With pi_phi = 1, s is exp(mean logp).
        delta: bounds the ratio where A < 0, which the clip leaves free to grow; above 1 + epsilon_high. Not for cispo.
        off_policy_shaping: gamma > 0 puts f(ratio) = ratio / (ratio + gamma) in place of the ratio of off-policy rows
            (LUFFY), whose gradient is f'(ratio) ratio grad logp; 0 leaves the ratio as it is.

    Returns:
        The loss, and metrics without gradient. Of on-policy tokens, 0 elsewhere: "ratio"; "clip_low", "clip_high" and,
        with delta, "clip_delta", 1 where that bound cut the gradient off (cispo: where the weight was truncated);
        "clip_region", their sum. Of all tokens: "kl", if ref_logp is given.

    Raises:
        UserError: unknown option, beta without ref_logp, or a delta that bounds nothing.

    Source: arXiv 2509.16990 eqs. 2-4; GSPO arXiv 2507.18071 section 4.3; LUFFY arXiv 2504.14945; CISPO and delta as
    TRL 1.16 defines them.
    """
    surrogate_of, _ = _chosen(LOSSES, "loss type", loss_type)
    ratio_of = _chosen(IMPORTANCE, "importance", importance)
    _check_delta(delta, loss_type=loss_type, epsilon_high=epsilon_high)
    if ref_logp is None and beta != 0:
        raise UserError(f"beta is {beta} but there are no reference log-probabilities: give ref_logp or set beta to 0.")
    mask = jnp.asarray(mask)
    on_policy = on_policy_mask(mask, is_off_policy)
    # The inputs are cleaned before any arithmetic: a NaN that is masked afterwards still has a NaN gradient.
    logp = jnp.where(mask, logp, 0.0)
    old_logp = jax.lax.stop_gradient(jnp.where(on_policy, old_logp, 0.0))
    advantage = jnp.where(mask, jnp.asarray(advantage)[..., None], 0.0)

    ratio = ratio_of(logp - old_logp, logp, mask)
    weight = _shaped(ratio, mask & ~on_policy, gamma=off_policy_shaping) if off_policy_shaping else ratio
    clip = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "delta": delta}
    surrogate, clipped = surrogate_of(weight, logp, advantage, on_policy, **clip)
    loss = -surrogate
    region = functools.reduce(jnp.logical_or, clipped.values())
    metrics = {"ratio": jnp.where(on_policy, ratio, 0.0), **clipped, "clip_region": region}
    metrics = {name: x.astype(ratio.dtype) for name, x in metrics.items()}
    if ref_logp is not None:
        ref_logp = jax.lax.stop_gradient(jnp.where(mask, ref_logp, 0.0))
        metrics["kl"] = kl_estimate(logp, ref_logp, kind=kl)
        if beta != 0:
            loss = loss + beta * metrics["kl"]
    metrics = {name: jax.lax.stop_gradient(jnp.where(mask, x, 0.0)) for name, x in metrics.items()}
    return jnp.where(mask, loss, 0.0), metrics


def on_policy_mask(mask: Bool[Array, "P G T"], is_off_policy: Bool[Array, "P G"] | None) -> Bool[jax.Array, "P G T"]:
    """The tokens of the mask that were sampled."""
    mask = jnp.asarray(mask)
    return mask if is_off_policy is None else mask & ~jnp.asarray(is_off_policy)[..., None]


def policy_loss(
    logp: Float[Array, "P G T"],
    old_logp: Float[Array, "P G T"],
    ref_logp: Float[Array, "P G T"] | None,
    advantage: Float[Array, "P G"],
    mask: Bool[Array, "P G T"],
    is_off_policy: Bool[Array, "P G"] | None = None,
    *,
    loss_type: str = "dapo",
    epsilon_low: float | int = 0.2,
    epsilon_high: float | int = 0.2,
    beta: float | int = 0.02,
    kl: str = "k3",
    importance: str = "token",
    max_completion_length: int | None = None,
    delta: float | int | None = None,
    off_policy_shaping: float | int = 0.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    """The loss of a whole batch: sum(token_weights * token_loss), with the token means of the metrics.

    See token_loss for the arguments and metrics, token_weights for the normalisation (max_completion_length is read by
    dr_grpo only). Metrics of the ratio are means over on-policy tokens, "kl" over all.

    >>> logp = jnp.log(jnp.array([[[0.5, 0.25]]]))
    >>> mask = jnp.array([[[True, True]]])
    >>> loss, metrics = policy_loss(logp, logp, None, jnp.array([[2.0]]), mask, beta=0.0)
    >>> float(loss), float(metrics["ratio"])
    (-2.0, 1.0)
    """
    loss, metrics = token_loss(
        logp,
        old_logp,
        ref_logp,
        advantage,
        mask,
        is_off_policy,
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=beta,
        kl=kl,
        importance=importance,
        delta=delta,
        off_policy_shaping=off_policy_shaping,
    )
    weights = token_weights(mask, loss_type=loss_type, max_completion_length=max_completion_length)
    sampled = on_policy_mask(mask, is_off_policy)
    counts = {name: _count(sampled if name in ON_POLICY_METRICS else mask) for name in metrics}
    return jnp.sum(weights * loss), {name: jnp.sum(x / counts[name]) for name, x in metrics.items()}


def sft_token_loss(logp: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Tokens:
    """Negative log-likelihood of every target token, 0 where masked: the supervised loss is sum(token_weights * it)."""
    return jnp.where(mask, -jnp.where(mask, logp, 0.0), 0.0)
