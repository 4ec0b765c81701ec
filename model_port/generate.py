# SPDX-License-Identifier: Apache-2.0
"""Sampling completions: the prompt is encoded and prefilled once, then G samples decode over its keys and values."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from model_port.batch import Batch, Completions
from model_port.decoder import grow_cache, thin_cache, unrolled_on
from model_port.errors import UserError
from model_port.model import GraniteSpeech, has_audio, last_hidden
from model_port.sampling import row_keys, sample

FIRST_STAGE = 32  # slots of a cache at most
FEW = 4  # a quarter of a group's samples: where no more go on in any group, the others are left out


def generate(
    model: GraniteSpeech,
    batch: Batch,
    *,
    key: Array | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float | int = 1.0,
    top_p: float | int = 1.0,
    top_k: int = 0,
    min_p: float | int = 0.0,
) -> Completions:
    """Sample `num_samples` completions of at most `max_new_tokens` tokens for every prompt.

    Args:
        key: a PRNG key (`jax.random.key(seed)`). Greedy decoding needs none.
        temperature: 0 decodes greedily.
        top_p: sample from the smallest set of tokens that holds this probability mass.
        top_k: sample from this many most probable tokens; 0 from all.
        min_p: sample tokens at least this many times as probable as the most probable one; 0 any.

    Raises:
        UserError: a number out of range, or sampling without a key.
    """
    truncation = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    check_sampling(num_samples=num_samples, max_new_tokens=max_new_tokens, temperature=temperature, **truncation)
    if key is None:
        if temperature > 0:
            raise UserError("sampling needs a key: pass key=jax.random.key(seed), or temperature=0 for greedy decoding")
        key = jax.random.key(0)
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys = row_keys(key, num_prompts=batch.tokens.shape[0], num_samples=num_samples)
    truncation = {"top_p": float(top_p), "top_k": top_k, "min_p": float(min_p)}
    options = {"num_tokens": max_new_tokens, "temperature": float(temperature), **truncation}
    return _generate(*nnx.split(model), batch, keys, **options)


def check_sampling(
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float | int,
    top_p: float | int,
    top_k: int = 0,
    min_p: float | int = 0.0,
) -> None:
    """Raise UserError for a sampling option out of range."""
    for name, value, wrong, allowed in (
        ("num_samples", num_samples, num_samples < 1, "at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens < 1, "at least 1"),
        ("temperature", temperature, not 0 <= temperature < float("inf"), "0 (greedy) or a positive number"),
        ("top_p", top_p, not 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k < 0, "at least 0, which keeps every token"),
        ("min_p", min_p, not 0 <= min_p <= 1, "at least 0 and at most 1"),
    ):
        if wrong:
            raise UserError(f"{name} must be {allowed}, got {value}")


def sample_completions(
    model: GraniteSpeech,
    batch: Batch,
    encoded: Float[Array, "P C A X"],
    keys: Key[Array, "P G"],
    *,
    num_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    limits: Int[Array, "P G"] | None = None,
    stationary: bool = False,
    unrolled: bool = False,
    cache_dtype: Any = None,
) -> Completions:
    """Prefill every prompt once and decode until all samples have ended or T tokens stand. Traceable.

    Draw t of a row uses fold_in(its key, t): it depends on neither the batch, the mesh nor the other samples.

    Args:
        limits: tokens of each sample at most, where that is less than T.
        stationary: whether the weights stay split over fsdp while tokens are decoded (model_port.partition).
        unrolled: whether the decoder's layers are unstacked (Decoder.decoding); compile time then grows with depth.
        cache_dtype: of the keys and values of prompts and completions; by default that of the model.
    """
    use_lora = has_audio(batch)
    hidden, prefix = model.decoder.prefill(model.embed_prompts(batch, encoded), batch.mask, use_lora=use_lora)
    first = model.policy_logits(last_hidden(hidden, batch.mask))[:, None]
    num_prompts, num_samples = keys.shape
    eos, pad = jnp.asarray(model.config.eos_token_ids, jnp.int32), jnp.int32(model.config.pad_token_id)
    limits = jnp.full((num_prompts, num_samples), num_tokens) if limits is None else limits
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))

    def draw(keys, logits, t):
        return sample(fold(keys, t), logits, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)

    def write(limits, out: Completions, t, token, logp, running):
        parts = {"tokens": jnp.where(running, token, pad), "mask": running, "logp": jnp.where(running, logp, 0.0)}
        put = {
            name: jax.lax.dynamic_update_slice_in_dim(getattr(out, name), part[:, :, None], t, axis=2)
            for name, part in parts.items()
        }
        running = running & (token[:, :, None] != eos[None, None, :]).all(-1) & (t + 1 < limits)
        return Completions(**put), parts["tokens"], running

    @jax.named_scope("decode_token")
    def decode(keys, limits, state):
        t, token, running, cache, out = state
        x = model.embed_completions(token)
        step = {"use_lora": use_lora, "stationary": stationary}
        hidden, cache = model.decoder.step(x, layers, prefix, batch.mask, cache, t - 1, **step)
        logits = model.policy_logits(hidden)
        token, logp = draw(keys, logits, t)
        out, token, running = write(limits, out, t, token, logp, running)
        return t + 1, token, running, cache, out

    shape = (num_prompts, num_samples, num_tokens)
    out = Completions(tokens=jnp.full(shape, pad), mask=jnp.zeros(shape, bool), logp=jnp.zeros(shape, jnp.float32))
    token, logp = draw(keys, jnp.broadcast_to(first, (num_prompts, num_samples, first.shape[-1])), 0)
    out, token, running = write(limits, out, 0, token, logp, jnp.ones((num_prompts, num_samples), bool))
    sizes = cache_sizes(num_tokens, unrolled=unrolled)
    layers, prefix, cache = model.decoder.decoding(
        prefix, num_samples=num_samples, num_tokens=sizes[0], dtype=cache_dtype or model.dtype, unrolled=unrolled
    )
    state = (jnp.int32(1), token, running, cache, out)
    return _in_stages(decode, (keys, limits), state, sizes, few=num_samples // FEW if len(sizes) > 1 else 0)


def _in_stages(decode: Callable, of_samples: tuple, state: tuple, sizes: list[int], *, few: int) -> Completions:
    """Decode until all samples have ended or T tokens stand; return the completions.

    In stages, for each of which the cache grows to one of `sizes` slots; one that no sample reaches is never made.
    Where at most `few` samples of any group go on, all others are left out, whose tokens would cost as much.

    Args:
        decode: (*of_samples, state) to the state with a token more.
        of_samples: [P, G] each.
        state: (tokens so far, last tokens, whether a sample goes on, cache, completions).
    """
    num_tokens = state[-1].tokens.shape[2]
    take = jax.vmap(lambda values, chosen: values[chosen])

    def more_than(few, running):
        return running.sum(1).max() > few

    def going(stop, few, state):
        return (state[0] < stop) & more_than(few, state[2])

    def thin(state):
        """Return which samples of each group are the few, all completions, and the state of these samples alone."""
        t, token, running, cache, out = state
        if not few:
            return out
        rows = jnp.argsort(~running, axis=1, stable=True)[:, :few]
        token, running, own = jax.tree.map(lambda values: take(values, rows), (token, running, out))
        return rows, out, (t, token, running, grow_cache(thin_cache(cache, rows), sizes[-1]), own)

    def through(sizes, state):
        *others, cache, out = state
        state = (*others, grow_cache(cache, sizes[0]), out)
        until = partial(going, min(sizes[0] + 1, num_tokens), few)
        state = jax.lax.while_loop(until, partial(decode, *of_samples), state)
        if len(sizes) == 1:
            return thin(state)
        return jax.lax.cond(more_than(few, state[2]), partial(through, sizes[1:]), thin, state)

    found = through(sizes, state)
    if not few:
        return found
    rows, out, state = found
    own = [take(values, rows) for values in of_samples]
    state = jax.lax.while_loop(partial(going, num_tokens, 0), partial(decode, *own), state)
    put = jax.vmap(lambda values, chosen, new: values.at[chosen].set(new))
    return jax.tree.map(lambda values, new: put(values, rows, new), out, state[-1])


def cache_sizes(num_tokens: int, *, unrolled: bool) -> list[int]:
    """Return the slots of the cache from stage to stage of decoding; the last of T tokens needs none.

    A token reads all slots, also those that are empty, so that their number should be that of the tokens there are: it
    doubles from stage to stage. Each stage compiles the layers once more, and so do the few samples that go on longest.
    Where layers are scanned, as on TPUs, there is one stage.
    """
    sizes = [max(num_tokens - 1, 1)]
    while unrolled and sizes[0] > FIRST_STAGE:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


@partial(jax.jit, static_argnums=0, static_argnames=("num_tokens", "temperature", "top_p", "top_k", "min_p"))
def _generate(graph, state, batch, keys, **options):
    model = nnx.merge(graph, state)
    encoded = model.encode(batch.features, batch.lengths)
    return sample_completions(model, batch, encoded, keys, unrolled=unrolled_on(jax.default_backend()), **options)
