# SPDX-License-Identifier: Apache-2.0
"""Drawing a token from logits: temperature, truncation, one random key per row.

P prompts, G samples per prompt, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from model_port.errors import UserError
from model_port.partition import VOCAB_MULTIPLE, constrain

Array = jax.Array | np.ndarray


def row_keys(
    key: Key[jax.Array, ""], *, num_prompts: int, num_samples: int, first_row: int | Int[Array, ""] = 0
) -> Key[jax.Array, "P G"]:
    """One key per row, derived from the row's place in the whole batch: draws depend on neither mesh nor batch split.

    Args:
        first_row: global index of row (0, 0); sample g of prompt p is row first_row + p * num_samples + g.
    """
    rows = first_row + jnp.arange(num_prompts * num_samples, dtype=jnp.uint32).reshape(num_prompts, num_samples)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, rows)


def check_truncation(*, top_p: float | int = 1.0, top_k: int = 0, min_p: float | int = 0.0) -> None:
    """Raise UserError for an option of truncate_logits out of range."""
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], got {top_p}; 1 keeps every token.")
    if top_k < 0:
        raise UserError(f"top_k must be at least 0, got {top_k}; 0 keeps every token.")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p must lie in [0, 1], got {min_p}; 0 keeps every token.")


def truncate_logits(
    logits: Float[Array, "*rows V"],
    *,
    top_p: float | int = 1.0,
    top_k: int = 0,
    min_p: float | int = 0.0,
    keep: Int[Array, "*rows"] | None = None,
) -> Float[jax.Array, "*rows V"]:
    """Keep the most probable tokens; the others become -inf. Options that keep every token compute nothing.

    One after the other, in the order of transformers' generate, each on what the one before has left:

    top_k keeps the k largest logits, and those equal to the last of them.
    top_p keeps the smallest set of most probable tokens whose probability reaches it: a token stays if the tokens
        before it, in order of falling probability and rising id, hold less than top_p.
    min_p keeps tokens at least min_p times as probable as the most probable one.

    The most probable token always stays. Which tokens stay has no gradient.

    Args:
        keep: one token of every row that stays in any case. Scoring a sampled token with it gives the log-prob that it
            was sampled with, and never -inf where rounding or a newer policy moves it over the bound.

    Raises:
        UserError: an option out of range.
    """
    check_truncation(top_p=top_p, top_k=top_k, min_p=min_p)
    logits = jnp.asarray(logits)
    if top_p == 1 and top_k == 0 and min_p == 0:
        return logits
    kept = jax.lax.stop_gradient(logits)
    if top_k > 0:
        last = jax.lax.top_k(kept, min(top_k, kept.shape[-1]))[0][..., -1:]
        kept = jnp.where(kept < last, -jnp.inf, kept)
    if top_p < 1:
        kept = jnp.where(_in_nucleus(kept, top_p), kept, -jnp.inf)
    if min_p > 0:
        # log(p) - log(p_max) is the difference of the logits.
        kept = jnp.where(kept < kept.max(axis=-1, keepdims=True) + math.log(min_p), -jnp.inf, kept)
    inside = ~jnp.isneginf(kept)
    if keep is not None:
        inside |= jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == jnp.asarray(keep)[..., None]
    return jnp.where(inside, logits, -jnp.inf)


def _in_nucleus(logits: Float[jax.Array, "*rows V"], top_p: float | int) -> Bool[jax.Array, "*rows V"]:
    """Whether each token is in the set that top_p keeps."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    reached = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    before = jnp.concatenate([jnp.zeros_like(reached[..., :1]), reached[..., :-1]], axis=-1)
    num_kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    # Only the last kept logit can tie with dropped ones: a count settles that, and no second sort is needed.
    lowest = jnp.take_along_axis(ordered, num_kept - 1, axis=-1)
    above, tied = logits > lowest, logits == lowest
    num_tied_kept = num_kept - jnp.sum(above, axis=-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= num_tied_kept))


def sample(
    keys: Key[Array, "P G"],
    logits: Float[Array, "P G V"],
    *,
    temperature: float | int,
    top_p: float | int = 1.0,
    top_k: int = 0,
    min_p: float | int = 0.0,
) -> tuple[Int[jax.Array, "P G"], Float[jax.Array, "P G"]]:
    """One token per row and its log-probability under the distribution it was drawn from.

    First a block of neighbouring ids is drawn by its probability, then an id inside it, both by the largest of
    log-prob + Gumbel noise: some hundred random numbers a row, where one for every id would cost more than the model's
    layers on a CPU.

    Args:
        keys: consumed; fold the position into them before every call.
        logits: divided by the model's logits scaling; forbidden ids at -inf.
        temperature: divides the logits. 0 takes the most probable token, reads no key, and gives the
            log-probability at temperature 1 over the full vocabulary.
        top_p, top_k, min_p: see truncate_logits; applied after the temperature.

    Returns:
        tokens int32, and logp float32: that of the truncated distribution at this temperature, renormalised.

    Raises:
        UserError: negative temperature, or a truncation out of range.
    """
    check_truncation(top_p=top_p, top_k=top_k, min_p=min_p)
    if temperature < 0:
        raise UserError(f"temperature must be 0 (greedy) or more, got {temperature}.")
    logits = jnp.asarray(logits, jnp.float32)
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, _taken(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)
    logits = truncate_logits(logits / temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    spare = -logits.shape[-1] % VOCAB_MULTIPLE
    logits = jnp.pad(logits, [(0, 0), (0, 0), (0, spare)], constant_values=-jnp.inf) if spare else logits
    count = num_blocks(logits.shape[-1])
    blocks = logits.reshape(*logits.shape[:-1], count, -1)
    mass = constrain(jax.nn.logsumexp(blocks, axis=-1))  # on every device of the tensor axis
    draw = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (count + blocks.shape[-1],), jnp.float32)))
    noise = draw(keys)
    block = jnp.argmax(mass + noise[..., :count], axis=-1)
    # A sum, not a gather: where the vocabulary is split over devices, each adds what it has.
    drawn = jax.lax.broadcasted_iota(jnp.int32, blocks.shape, blocks.ndim - 2) == block[..., None, None]
    inside = jnp.where(drawn, blocks, 0.0).sum(-2)
    place = jnp.argmax(inside + noise[..., count:], axis=-1)
    tokens = (block * blocks.shape[-1] + place).astype(jnp.int32)
    return tokens, _taken(inside, place) - jax.nn.logsumexp(mass, axis=-1)


def num_blocks(vocab_size: int) -> int:
    """Return into how many equal blocks of ids `sample` divides a vocabulary: about the square root of its size.

    A multiple of the vocabulary's own factors of two, up to 64, so that no block lies on two devices of a mesh.
    """
    unit = math.gcd(vocab_size, 64)
    counts = (unit * factor for factor in range(1, vocab_size // unit + 1) if vocab_size % (unit * factor) == 0)
    return min(counts, key=lambda count: count + vocab_size // count)


def _taken(values: Float[jax.Array, "*rows V"], ids: Int[jax.Array, "*rows"]) -> Float[jax.Array, "*rows"]:
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]
