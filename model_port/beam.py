# SPDX-License-Identifier: Apache-2.0
"""Beam search: the most probable completion that a few hypotheses per prompt, extended side by side, can find.

The result is that of transformers' `generate(num_beams=B, do_sample=False, early_stopping=False)`, with three
differences. Log-probs are normalised without `<|audio|>`, which no completion holds; transformers' suppress_tokens
takes it out after the softmax. Where two candidates have exactly the same score, the one from the better hypothesis,
then the lower token id, goes first; torch leaves that open. A prompt's search ends by itself, whatever others do; in
transformers it also stands still then, so the results agree.

Shape letters, in addition to the ones of model_port.generate: B beams of a prompt, K candidates for the next ones.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model_port.batch import Batch, Completions, struct
from model_port.decoder import unrolled_on
from model_port.errors import UserError
from model_port.model import GraniteSpeech, has_audio, last_hidden

NEVER = -1e9  # score of what must not be chosen, as in transformers; finite, so that sums stay ordered


@struct
class Hypotheses:
    """The beginnings that a search goes on with, or the completions it has found, best first.

    Attributes:
        tokens: the pad id after the end.
        logp: log-prob of each token; 0 after the end.
        length: tokens.
        score: sum of log-probs; of a found completion, divided by its length to the power of the length penalty;
            NEVER where nothing has been found yet.
    """

    tokens: Int[Array, "P B T"]
    logp: Float[Array, "P B T"]
    length: Int[Array, "P B"]
    score: Float[Array, "P B"]

    def take(self, index: Int[Array, "P N"]) -> "Hypotheses":
        """Return these ones of each prompt."""

        def pick(x):
            return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

        return jax.tree.map(pick, self)


def beam_search(
    model: GraniteSpeech,
    batch: Batch,
    *,
    num_beams: int,
    max_new_tokens: int = 200,
    length_penalty: float | int = 1.0,
) -> Completions:
    """Return the best completion [P, 1, T] of every prompt that a beam search of this width finds.

    Args:
        length_penalty: a completion's score is its log-prob divided by its length, end token included, to this power.

    Raises:
        UserError: a number out of range.
    """
    check_beams(num_beams=num_beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty)
    settings = {"num_tokens": max_new_tokens, "length_penalty": float(length_penalty)}
    return _beam_search(*nnx.split(model), batch, num_beams=num_beams, **settings)


def check_beams(*, num_beams: int, max_new_tokens: int, length_penalty: float | int = 1.0) -> None:
    """Raise UserError for an option of beam_search out of range."""
    for name, value, wrong, allowed in (
        ("num_beams", num_beams, num_beams < 1, "at least 1, which decodes greedily"),
        ("max_new_tokens", max_new_tokens, max_new_tokens < 1, "at least 1"),
        ("length_penalty", length_penalty, not abs(length_penalty) < float("inf"), "a finite number"),
    ):
        if wrong:
            raise UserError(f"{name} must be {allowed}, got {value}")


def search_completions(
    model: GraniteSpeech,
    batch: Batch,
    encoded: Float[Array, "P C A X"],
    *,
    num_beams: int,
    num_tokens: int,
    length_penalty: float = 1.0,
    stationary: bool = False,
    unrolled: bool = False,
    cache_dtype: Any = None,
) -> Completions:
    """Prefill every prompt once and search over its keys and values; each beam has a cache of its own. Traceable.

    `stationary`, `unrolled` and `cache_dtype` are those of model_port.generate.sample_completions.
    """
    use_lora = has_audio(batch)
    hidden, prefix = model.decoder.prefill(model.embed_prompts(batch, encoded), batch.mask, use_lora=use_lora)
    num_prompts = batch.tokens.shape[0]
    eos, pad = jnp.asarray(model.config.eos_token_ids, jnp.int32), model.config.pad_token_id
    empty = _empty((num_prompts, num_beams, num_tokens), pad)

    def advance(beams, finished, going, logits, t):
        """Extend the beams by token t; return new ones, the parent of each, what is finished, and who goes on."""
        candidates, parent, ended = _candidates(beams, logits, eos, t)
        finished = _finish(finished, candidates, ended & going[:, None], length_penalty)
        running = dataclasses.replace(candidates, score=candidates.score + jnp.where(ended, NEVER, 0.0))
        order = jax.lax.top_k(running.score, num_beams)[1]
        beams = running.take(order)
        # With early_stopping=False: could the best beam, had it ended here, still displace the worst found?
        best = beams.score[:, 0] / (t + 1.0) ** length_penalty
        return beams, jnp.take_along_axis(parent, order, axis=1), finished, going & (best > finished.score.min(-1))

    def keep_going(state):
        t, _, _, _, going = state
        return (t < num_tokens) & going.any()

    def extend(state):
        t, beams, cache, finished, going = state
        last = jax.lax.dynamic_index_in_dim(beams.tokens, t - 1, axis=2, keepdims=False)
        x = model.embed_completions(last)
        step = {"use_lora": use_lora, "stationary": stationary}
        hidden, cache = model.decoder.step(x, layers, prefix, batch.mask, cache, t - 1, **step)
        logits = model.policy_logits(hidden)
        beams, parent, finished, going = advance(beams, finished, going, logits, t)
        cache = jax.tree.map(lambda store: _of_parents(store, parent), cache)
        return t + 1, beams, cache, finished, going

    first = model.policy_logits(last_hidden(hidden, batch.mask))[:, None]
    first = jnp.broadcast_to(first, (num_prompts, num_beams, first.shape[-1]))
    # All beams begin alike: only the first may be extended, or they would stay alike.
    start = jnp.where(jnp.arange(num_beams) == 0, 0.0, NEVER)[None]
    beams = dataclasses.replace(empty, score=jnp.broadcast_to(start, (num_prompts, num_beams)))
    beams, _, finished, going = advance(beams, empty, jnp.ones(num_prompts, bool), first, 0)
    sizes = {"num_samples": num_beams, "num_tokens": max(num_tokens - 1, 1)}
    layers, prefix, cache = model.decoder.decoding(prefix, **sizes, dtype=cache_dtype or model.dtype, unrolled=unrolled)
    finished = jax.lax.while_loop(keep_going, extend, (jnp.int32(1), beams, cache, finished, going))[3]
    best = finished.take(jnp.zeros((num_prompts, 1), jnp.int32))
    mask = jnp.arange(num_tokens)[None, None] < best.length[:, :, None]
    return Completions(tokens=best.tokens, mask=mask, logp=best.logp)


def _of_parents(store: Float[Array, "*n P B K T h"], parent: Int[Array, "P B"]) -> Float[Array, "*n P B K T h"]:
    index = parent.reshape((1,) * (store.ndim - 5) + parent.shape + (1, 1, 1))
    return jnp.take_along_axis(store, index, axis=store.ndim - 4)


def _empty(shape: tuple[int, int, int], pad: int) -> Hypotheses:
    return Hypotheses(
        tokens=jnp.full(shape, pad, jnp.int32),
        logp=jnp.zeros(shape, jnp.float32),
        length=jnp.zeros(shape[:2], jnp.int32),
        score=jnp.full(shape[:2], NEVER),
    )


def _candidates(
    beams: Hypotheses, logits: Float[Array, "P B V"], eos: Int[Array, " e"], t
) -> tuple[Hypotheses, Int[Array, "P K"], Bool[Array, "P K"]]:
    """Return the best extensions by token t, the beam that each comes from, and whether it is complete.

    There are enough of them that num_beams go on even if every beam ends with every end token.
    """
    num_prompts, num_beams, vocab = logits.shape
    count = max(2, 1 + eos.shape[0]) * num_beams
    logp = jax.nn.log_softmax(logits, axis=-1)
    total = (logp + beams.score[:, :, None]).reshape(num_prompts, -1)
    score, index = jax.lax.top_k(total, count)
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    chosen = jnp.take_along_axis(logp.reshape(num_prompts, -1), index, axis=1)
    # The last token that fits completes a hypothesis, too.
    ended = (token[:, :, None] == eos[None, None, :]).any(-1) | (t + 1 == beams.tokens.shape[-1])
    old = beams.take(parent)
    new = Hypotheses(
        tokens=jax.lax.dynamic_update_slice_in_dim(old.tokens, token[:, :, None], t, axis=2),
        logp=jax.lax.dynamic_update_slice_in_dim(old.logp, chosen[:, :, None], t, axis=2),
        length=old.length + 1,
        score=score,
    )
    return new, parent, ended


def _finish(
    finished: Hypotheses, candidates: Hypotheses, ended: Bool[Array, "P K"], length_penalty: float
) -> Hypotheses:
    """Keep the best of what was found before and the candidates that have ended now.

    Only candidates among the num_beams best count: the others exist so that there is something to go on with.
    """
    num_beams = finished.score.shape[1]
    ended = ended & (jnp.arange(ended.shape[1]) < num_beams)[None]
    score = candidates.score / candidates.length.astype(jnp.float32) ** length_penalty
    new = dataclasses.replace(candidates, score=jnp.where(ended, score, NEVER))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), finished, new)
    return both.take(jax.lax.top_k(both.score, num_beams)[1])


@partial(jax.jit, static_argnums=0, static_argnames=("num_beams", "num_tokens", "length_penalty"))
def _beam_search(graph, state, batch, **options):
    model = nnx.merge(graph, state)
    encoded = model.encode(batch.features, batch.lengths)
    return search_completions(model, batch, encoded, unrolled=unrolled_on(jax.default_backend()), **options)
