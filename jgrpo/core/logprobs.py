# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and entropies of given tokens, without the [P, N, V] array of their logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from model_port.errors import UserError
from model_port.sampling import truncate_logits

Array = jax.Array | np.ndarray


def _token_logprobs(
    logits: Float[jax.Array, "*shape V"], targets: Int[jax.Array, "*shape"]
) -> tuple[Float[jax.Array, "*shape"], Float[jax.Array, "*shape"]]:
    """log softmax(logits) at the targets, and the entropy, which carries no gradient."""
    log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logp = jnp.take_along_axis(logits, targets[..., None], axis=-1) - log_normaliser
    log_probs = jax.lax.stop_gradient(logits - log_normaliser)
    # A forbidden id has log_probs -inf, and 0 * -inf is NaN.
    entropy = -jnp.sum(jnp.where(jnp.isneginf(log_probs), 0.0, jnp.exp(log_probs) * log_probs), axis=-1)
    return logp[..., 0], entropy


def chunked_logprobs(
    hidden: Float[Array, "P N D"],
    targets: Int[Array, "P N"],
    logits_fn: Callable[[jax.Array], jax.Array],
    *,
    chunk_tokens: int,
    temperature: float | int = 1.0,
    top_p: float | int = 1.0,
    top_k: int = 0,
    min_p: float | int = 0.0,
) -> tuple[Float[jax.Array, "P N"], Float[jax.Array, "P N"]]:
    """Log-probability of each target and entropy of its distribution, a slice of N at a time.

    Each slice holds at most chunk_tokens tokens (at least one per row), and its logits are computed again in the
    backward pass, so memory does not grow with N. The slices run along N and leave the axis P sharded as it was.

    Args:
        hidden: hidden[p, n] predicts targets[p, n].
        logits_fn: [..., D] -> float32 [..., V], divided by the model's logits scaling; forbidden ids are -inf or a
            very negative number. A forbidden target has that log-probability.
        chunk_tokens: over all P rows of the arrays given, whatever the mesh.
        temperature: divides the logits, for both results. Not 0: the log-probabilities of greedy decoding are those
            at temperature 1.
        top_p, top_k, min_p: the truncation that the targets were sampled with, see truncate_logits. Log-probabilities
            and entropies are those of the truncated distribution, renormalised, in which every target stays whatever
            its rank: a token that was sampled gets the log-probability that it was sampled with, and one that a newer
            policy would no longer sample, or that a reference answer holds, a finite one.

    Returns:
        logp and entropy, in nats. The entropy's gradient is stopped.

    Raises:
        UserError: chunk_tokens or temperature not positive, or a truncation out of range.
    """
    if chunk_tokens < 1:
        raise UserError(f"chunk_tokens must be at least 1, got {chunk_tokens}.")
    if temperature <= 0:
        raise UserError(f"log-probabilities need a temperature above 0, got {temperature}; score greedy output at 1.")
    num_prompts, length = targets.shape
    chunk = max(1, min(length, chunk_tokens // num_prompts))
    num_chunks = -(-length // chunk)

    def split(x: Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(num_prompts, num_chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(num_prompts, num_chunks * chunk)[:, :length]

    def score(_, hidden_and_targets):
        hidden_chunk, target_chunk = hidden_and_targets
        logits = logits_fn(hidden_chunk)
        logits = logits if temperature == 1 else logits / temperature
        logits = truncate_logits(logits, top_p=top_p, top_k=top_k, min_p=min_p, keep=target_chunk)
        return None, _token_logprobs(logits, target_chunk)

    # prevent_cse is for checkpoints outside a scan; inside one it only costs fusion.
    _, (logp, entropy) = jax.lax.scan(jax.checkpoint(score, prevent_cse=False), None, (split(hidden), split(targets)))
    return join(logp), join(entropy)
