"""The GRPO family of losses, as a per-token loss and the weights that add it up.

    loss = sum(token_weights(mask) * token_loss(...))

The weights depend on the mask only. Computed once for the whole batch and sliced with it, they make the gradient the
same for any number of micro-batches and any mesh: the pieces are added, never averaged.

P prompts, G samples per prompt, T completion tokens. The mask is true up to and including the end-of-sequence token.
What the other arrays hold at masked positions is never read: NaN and infinities there reach neither loss nor gradient.
"""

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


def _per_sequence(mask: Bool[Array, "P G T"]) -> Float[jax.Array, "P G 1"]:
    """1 / (P G |o_i|): the mean over sequences of each sequence's token mean."""
    return 1.0 / (_count(mask, axis=-1) * (mask.shape[0] * mask.shape[1]))


def _per_token(mask: Bool[Array, "P G T"]) -> Float[jax.Array, "1 1 1"]:
    """1 / sum |o_i|: the mean over all tokens."""
    return 1.0 / _count(mask)


# The weight of a token that counts, from the mask. dr_grpo is not here: it needs a constant, see token_weights.
_WEIGHTS = {"grpo": _per_sequence, "dapo": _per_token, "bnpo": _per_token, "cispo": _per_token}
LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo")
IMPORTANCE = ("token", "sequence")


def _check_option(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{what} {value!r} is unknown: use one of {', '.join(allowed)}.")


def token_weights(mask: Bool[Array, "P G T"], *, loss_type: str, max_completion_length: int | None = None) -> Tokens:
    """The weight of every token in the loss; 0 where masked.

    | loss type   | weight of a token of sequence i                                                        |
    |-------------|----------------------------------------------------------------------------------------|
    | grpo        | 1 / (P G len_i): mean over sequences of the sequence mean; empty sequences count as 0  |
    | dapo, cispo | 1 / sum_j len_j: mean over the tokens of the whole batch                               |
    | bnpo        | the same over the arrays given: call it on each micro-batch, and divide by their count |
    | dr_grpo     | 1 / (P G max_completion_length): independent of the lengths                            |

    Raises:
        UserError: unknown loss type, or dr_grpo without a max_completion_length.

    >>> token_weights(jnp.array([[[True, True, True], [True, False, False]]]), loss_type="dapo").tolist()
    [[[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]]
    """
    _check_option("loss type", loss_type, LOSS_TYPES)
    if loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise UserError(
                f"loss type dr_grpo divides by the maximum completion length, got {max_completion_length}: "
                "give a positive max_completion_length."
            )
        weight = jnp.full((1, 1, 1), 1.0 / (mask.shape[0] * mask.shape[1] * max_completion_length))
    else:
        weight = _WEIGHTS[loss_type](mask)
    return jnp.where(mask, weight, 0.0)


def _importance_ratio(logp: Tokens, old_logp: Tokens, mask: Bool[Array, "P G T"], *, importance: str) -> Tokens:
    """pi_theta / pi_old per token, or the sequence's geometric mean of it spread over its tokens."""
    if importance == "token":
        return jnp.exp(logp - old_logp)
    mean_log_ratio = jnp.sum(logp - old_logp, axis=-1, keepdims=True) / _count(mask, axis=-1)
    return jax.lax.stop_gradient(jnp.exp(mean_log_ratio)) * jnp.exp(logp - jax.lax.stop_gradient(logp))


def _surrogate(
    ratio: Tokens,
    advantage: Tokens,
    on_policy: Bool[jax.Array, "P G T"],
    *,
    epsilon_low: float | int,
    epsilon_high: float | int,
) -> tuple[Tokens, Bool[jax.Array, "P G T"], Bool[jax.Array, "P G T"]]:
    """min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A), and where its lower or upper bound holds.

    The minimum takes the bound only on the side where going on would still pay: above for A > 0, below for A < 0.
    """
    low = on_policy & (advantage < 0) & (ratio < 1 - epsilon_low)
    high = on_policy & (advantage > 0) & (ratio > 1 + epsilon_high)
    bounded = jnp.where(low, 1 - epsilon_low, jnp.where(high, 1 + epsilon_high, ratio))
    return bounded * advantage, low, high


def _cispo_surrogate(
    ratio: Tokens, logp: Tokens, advantage: Tokens, on_policy: Bool[jax.Array, "P G T"], *, epsilon_high: float | int
) -> tuple[Tokens, Bool[jax.Array, "P G T"], Bool[jax.Array, "P G T"]]:
    """stop_gradient(min(ratio, epsilon_high)) A log pi, and where the weight is truncated (never from below)."""
    high = on_policy & (ratio > epsilon_high)
    weight = jax.lax.stop_gradient(jnp.where(high, epsilon_high, ratio))
    return weight * advantage * logp, jnp.zeros_like(high), high


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
) -> tuple[Tokens, dict[str, Tokens]]:
    """Loss of every token, -surrogate + beta * KL, and per-token metrics; both 0 where masked.

    grpo, dapo, bnpo, dr_grpo:  surrogate = min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A)
    cispo:                      surrogate = stop_gradient(min(ratio, epsilon_high)) A logp

    In cispo epsilon_high is itself the bound on the ratio, not its distance from 1: values near 5 are usual.

    Args:
        old_logp: under the policy that sampled; constant in the gradient.
        ref_logp: under the reference policy; constant in the gradient. May be None when beta is 0.
        is_off_policy: rows that were not sampled (mixed-policy GRPO): their behaviour policy is taken as
            pi_phi = 1, so ratio = pi_theta, and nothing is clipped. Their old_logp is not read. The KL term
            applies to them as to every row.
        importance: "token": ratio = exp(logp - old_logp). "sequence" (GSPO, in its token form): the value is
            s = exp(mean over the sequence's tokens of logp - old_logp) at every token, the gradient is
            s * grad logp of that token. As all weights are equal within a sequence, the gradient of the loss is
            that of the sequence form too. With pi_phi = 1, s is exp(mean logp).

    Returns:
        The loss, and metrics without gradient: "ratio"; "clip_low" and "clip_high", 1 where that bound cut the
        gradient off (cispo: where the weight was truncated); "clip_region", their sum; "kl", if ref_logp is given.

    Raises:
        UserError: unknown option, or beta without ref_logp.

    Source: arXiv 2509.16990 eqs. 2-4; GSPO arXiv 2507.18071 section 4.3; CISPO as TRL 1.16 defines it.
    """
    _check_option("loss type", loss_type, LOSS_TYPES)
    _check_option("importance", importance, IMPORTANCE)
    if ref_logp is None and beta != 0:
        raise UserError(f"beta is {beta} but there are no reference log-probabilities: give ref_logp or set beta to 0.")
    on_policy = jnp.asarray(mask)
    if is_off_policy is not None:
        on_policy = on_policy & ~jnp.asarray(is_off_policy)[..., None]
    # The inputs are cleaned before any arithmetic: a NaN that is masked afterwards still has a NaN gradient.
    logp = jnp.where(mask, logp, 0.0)
    old_logp = jax.lax.stop_gradient(jnp.where(on_policy, old_logp, 0.0))
    advantage = jnp.where(mask, jnp.asarray(advantage)[..., None], 0.0)

    ratio = _importance_ratio(logp, old_logp, mask, importance=importance)
    if loss_type == "cispo":
        surrogate, low, high = _cispo_surrogate(ratio, logp, advantage, on_policy, epsilon_high=epsilon_high)
    else:
        surrogate, low, high = _surrogate(
            ratio, advantage, on_policy, epsilon_low=epsilon_low, epsilon_high=epsilon_high
        )
    loss = -surrogate
    metrics = {"ratio": ratio, "clip_low": low, "clip_high": high, "clip_region": low | high}
    metrics = {name: x.astype(ratio.dtype) for name, x in metrics.items()}
    if ref_logp is not None:
        ref_logp = jax.lax.stop_gradient(jnp.where(mask, ref_logp, 0.0))
        metrics["kl"] = kl_estimate(logp, ref_logp, kind=kl)
        if beta != 0:
            loss = loss + beta * metrics["kl"]
    metrics = {name: jax.lax.stop_gradient(jnp.where(mask, x, 0.0)) for name, x in metrics.items()}
    return jnp.where(mask, loss, 0.0), metrics


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
) -> tuple[Scalar, dict[str, Scalar]]:
    """The loss of a whole batch: sum(token_weights * token_loss), with the token means of the metrics.

    See token_loss for the arguments and metrics, token_weights for the normalisation (max_completion_length is read by
    dr_grpo only).

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
    )
    weights = token_weights(mask, loss_type=loss_type, max_completion_length=max_completion_length)
    return jnp.sum(weights * loss), {name: jnp.sum(x / _count(mask)) for name, x in metrics.items()}


def sft_token_loss(logp: Float[Array, "P G T"], mask: Bool[Array, "P G T"]) -> Tokens:
    """Negative log-likelihood of every target token, 0 where masked: the supervised loss is sum(token_weights * it)."""
    return jnp.where(mask, -jnp.where(mask, logp, 0.0), 0.0)
