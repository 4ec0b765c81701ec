"""Drawing a token from logits: temperature, nucleus truncation, one random key per row.

P prompts, G samples per prompt, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from model_port.errors import UserError

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


def _check_top_p(top_p: float | int) -> None:
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], got {top_p}; 1 keeps every token.")


def truncate_logits(logits: Float[Array, "*rows V"], *, top_p: float | int) -> Float[jax.Array, "*rows V"]:
    """Keep the smallest set of most probable tokens whose probability reaches top_p; the others become -inf.

    A token stays if the tokens before it, in order of falling probability and rising id, hold less than top_p. The
    most probable token therefore always stays. top_p 1 changes nothing and sorts nothing.

    Raises:
        UserError: top_p outside (0, 1].
    """
    _check_top_p(top_p)
    logits = jnp.asarray(logits)
    if top_p == 1:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    reached = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    before = jnp.concatenate([jnp.zeros_like(reached[..., :1]), reached[..., :-1]], axis=-1)
    num_kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    # Only the last kept logit can tie with dropped ones: a count settles that, and no second sort is needed.
    lowest = jnp.take_along_axis(ordered, num_kept - 1, axis=-1)
    above, tied = logits > lowest, logits == lowest
    num_tied_kept = num_kept - jnp.sum(above, axis=-1, keepdims=True)
    return jnp.where(above | (tied & (jnp.cumsum(tied, axis=-1) <= num_tied_kept)), logits, -jnp.inf)


def sample(
    keys: Key[Array, "P G"], logits: Float[Array, "P G V"], *, temperature: float | int, top_p: float | int
) -> tuple[Int[jax.Array, "P G"], Float[jax.Array, "P G"]]:
    """One token per row and its log-probability under the distribution it was drawn from.

    Args:
        keys: consumed; fold the position into them before every call.
        logits: divided by the model's logits scaling; forbidden ids at -inf.
        temperature: divides the logits. 0 takes the most probable token, reads no key, and gives the
            log-probability at temperature 1 over the full vocabulary.
        top_p: see truncate_logits; applied after the temperature.

    Returns:
        tokens int32, and logp float32, temperature and truncation included.

    Raises:
        UserError: negative temperature, or top_p outside (0, 1].
    """
    _check_top_p(top_p)
    if temperature < 0:
        raise UserError(f"temperature must be 0 (greedy) or more, got {temperature}.")
    logits = jnp.asarray(logits, jnp.float32)
    if temperature == 0:
        scores = logits
    else:
        logits = truncate_logits(logits / temperature, top_p=top_p)
        draw = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32)))
        scores = logits + draw(keys)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)
