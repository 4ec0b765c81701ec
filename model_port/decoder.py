# SPDX-License-Identifier: Apache-2.0
"""The Granite decoder. One layer runs in three ways: prompts, one decoding step, trees of completions.

A prompt's keys and values exist once, however many completions follow it. Source: transformers GraniteModel.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model_port.config import DecoderConfig, LoraConfig
from model_port.layers import (
    Embedding,
    Linear,
    Part,
    RMSNorm,
    attend,
    recomputed,
    rotary,
    rotary_tables,
    run_layers,
    unstack,
)
from model_port.lora import adapt
from model_port.partition import constrain, constrain_features, constrain_heads, constrain_stream

# Keys and values of all n layers, stacked; or, where layers are unrolled, of each.
KeysValues = (
    tuple[Float[Array, "n P L K h"], Float[Array, "n P L K h"]]
    | list[tuple[Float[Array, "P L K h"], Float[Array, "P L K h"]]]
)
Cache = (
    tuple[Float[Array, "n P G K T h"], Float[Array, "n P G K T h"]]
    | list[tuple[Float[Array, "P G K T h"], Float[Array, "P G K T h"]]]
)
# From so many slots on, the first half of a tree's queries does without the keys of the second, which it cannot see.
HALVED = 96


def unrolled_on(platform: str) -> bool:
    """Return whether decoding is faster with unstacked layers (Decoder.decoding) on cpu, gpu or tpu."""
    return platform != "tpu"


class SelfAttention(nnx.Module):
    """The four projections of an attention block."""

    def __init__(self, config: DecoderConfig, linear: Callable):
        query, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = linear("q_proj", config.hidden_size, query, axes=("embed", "heads"))
        self.k_proj = linear("k_proj", config.hidden_size, keys, axes=("embed", "kv_heads"))
        self.v_proj = linear("v_proj", config.hidden_size, keys, axes=("embed", "kv_heads"))
        self.o_proj = linear("o_proj", query, config.hidden_size, axes=("heads", "embed"))
        self.head_dim = config.head_dim

    def qkv(self, x: Float[Array, "P N D"], cos_sin, use_lora: bool):
        """Return rotated queries [P, N, H, h], rotated keys and values [P, N, K, h]."""
        q, k, v = (
            proj(x, use_lora).reshape(*x.shape[:2], -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotary(q, cos_sin), rotary(k, cos_sin), v


class MLP(nnx.Module):
    """Gated SiLU feed-forward."""

    def __init__(self, config: DecoderConfig, linear: Callable):
        self.gate_proj = linear("gate_proj", config.hidden_size, config.intermediate_size, axes=("embed", "mlp"))
        self.up_proj = linear("up_proj", config.hidden_size, config.intermediate_size, axes=("embed", "mlp"))
        self.down_proj = linear("down_proj", config.intermediate_size, config.hidden_size, axes=("mlp", "embed"))

    def __call__(self, x: Float[Array, "P N D"], use_lora: bool, stationary: bool) -> Float[Array, "P N D"]:
        hidden = _gated(self.gate_proj(x, use_lora), self.up_proj(x, use_lora))
        return self.down_proj(constrain_features(hidden, stationary), use_lora)


@recomputed
def _gated(gate, up):
    return jax.nn.silu(gate) * up


class Layer(nnx.Module):
    """One decoder layer; how its queries attend is the caller's."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, *, rngs, stack, dtype):
        kw = {"rngs": rngs, "stack": stack, "dtype": dtype}

        def linear(name, in_size, out_size, *, axes):
            made = Linear(in_size, out_size, axes=axes, bias=False, **kw)
            if lora and name in lora.target_modules:
                adapt(made, lora, rngs=rngs)
            return made

        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kw)
        self.self_attn = SelfAttention(config, linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kw)
        self.mlp = MLP(config, linear)
        self.residual_multiplier = config.residual_multiplier

    def __call__(self, x: Float[Array, "P N D"], cos_sin, look: Callable, use_lora: bool, stationary: bool = False):
        """Return the new stream and what `look(q, k, v) -> ([P, N, H, h], extra)` hands out besides.

        Args:
            stationary: whether the weights stay split over fsdp, and activations travel (model_port.partition).
        """
        residual = jnp.asarray(self.residual_multiplier, x.dtype)
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), cos_sin, use_lora)
        out, extra = look(q, k, v)
        out = constrain_features(out.reshape(*x.shape[:2], -1), stationary)
        x = constrain_stream(x + residual * self.self_attn.o_proj(out, use_lora), stationary)
        hidden = self.mlp(self.post_attention_layernorm(x), use_lora, stationary)
        return constrain_stream(x + residual * hidden, stationary), extra


class Decoder(nnx.Module):
    """Token and audio embeddings, the embedding multiplier applied, to final hidden states; streams are [P, N, D]."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, *, rngs, dtype=jnp.float32):
        kw = {"rngs": rngs, "dtype": dtype}
        self.config = config
        rows = config.vocab_size + config.vocab_padding
        self.embed_tokens = Embedding(rows, config.hidden_size, axes=("vocab", "embed"), **kw)
        self.layers = Layer(config, lora, stack=(config.num_hidden_layers,), **kw)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kw)

    def prefill(
        self, x: Float[Array, "P L D"], mask: Bool[Array, "P L"], *, use_lora: bool = True, remat: str = "none"
    ) -> tuple[Float[Array, "P L D"], KeysValues]:
        """Run left-aligned prompts; return hidden states and all layers' keys and values."""

        def look(q, k, v):
            return self._prompt_attention(q, k, v, mask), (constrain_heads(k), constrain_heads(v))

        tables = self._tables(jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2]))
        x, prefix = run_layers(
            self.layers, lambda layer, x, _: layer(x, tables, look, use_lora), constrain(x), None, remat=remat
        )
        return self.norm(x), prefix

    def decoding(
        self, prefix: KeysValues, *, num_samples: int, num_tokens: int, dtype, unrolled: bool = False
    ) -> tuple[Any, KeysValues, Cache]:
        """Return what `step` reads for T tokens of G samples: layers, the prompts' keys and values, an empty cache.

        Args:
            dtype: of prefix and cache.
            unrolled: whether each layer has weights, prefix and cache of its own. A scan over stacked ones copies what
                a layer reads for every token on CPUs and GPUs; on TPUs it is read in place.
        """
        prompts, heads, width = prefix[0].shape[1], self.config.num_key_value_heads, self.config.head_dim
        shape = (self.config.num_hidden_layers, prompts, num_samples, num_tokens, heads, width)
        cache = tuple(constrain_heads(jnp.zeros(shape, dtype), axis=1).swapaxes(-3, -2) for _ in range(2))
        prefix = tuple(part.astype(dtype) for part in prefix)
        if not unrolled:
            return self.layers, prefix, cache
        return unstack(self.layers), unstack(prefix), unstack(cache)

    def step(
        self,
        x: Float[Array, "P G D"],
        layers: Any,
        prefix: KeysValues,
        prefix_mask: Bool[Array, "P L"],
        cache: Cache,
        t,
        *,
        use_lora: bool,
        stationary: bool = False,
    ) -> tuple[Float[Array, "P G D"], Cache]:
        """Run the t-th completion token of all samples; return hidden states and the cache with slot t written.

        `layers`, `prefix` and the first `cache` are those of `decoding`.
        """
        samples, slots = x.shape[1], jax.tree.leaves(cache)[0].shape[-2]
        so_far = (jnp.arange(slots) <= t)[None, None, None, :]
        tables = self._tables(
            jnp.broadcast_to(prefix_mask.sum(-1, dtype=jnp.int32)[:, None] + t, (x.shape[0], samples))
        )

        def body(layer, carry, own):
            (x, cache), (index, prompt) = carry, own

            def look(q, k, v):
                q, k, v = (constrain_heads(part)[:, :, None] for part in (q, k, v))
                changed, completion = _write(cache, index, t, k, v)
                out = self._attend(q, Part(*prompt, prefix_mask[:, None, None]), Part(*completion, so_far))
                return out[:, :, 0], changed

            x, cache = layer(x, tables, look, use_lora, stationary)
            return (x, cache), None

        indices = range(len(layers)) if isinstance(layers, list) else jnp.arange(self.config.num_hidden_layers)
        own = list(zip(indices, prefix, strict=True)) if isinstance(layers, list) else (indices, prefix)
        (x, cache), _ = run_layers(layers, body, (x, cache), own)
        return self.norm(x), cache

    def complete(
        self,
        x: Float[Array, "P L D"],
        mask: Bool[Array, "P L"],
        nodes: Float[Array, "P F M D"],
        depths: Int[Array, "P F M"],
        ends: Int[Array, "P F M"],
        *,
        use_lora: bool = True,
        remat: str = "none",
    ) -> tuple[Float[Array, "P L D"], Float[Array, "P F M D"]]:
        """Run prompts and their completions together, as F prefix trees per prompt (batch.Trees says which are seen).

        Both parts travel as one stream of L + F M tokens through the projections; only attention tells them apart.
        """
        (p, length, _), (_, f, m, _) = x.shape, nodes.shape
        slot = jnp.arange(m)
        visible = (slot[None, :] <= slot[:, None])[None, None] & (slot[None, None, :, None] < ends[:, :, None])
        positions = (mask.sum(-1, dtype=jnp.int32)[:, None, None] + depths).reshape(p, f * m)
        prompt_positions = jnp.broadcast_to(jnp.arange(length)[None], (p, length))
        tables = self._tables(jnp.concatenate([prompt_positions, positions], axis=1))
        bounds = (0, m // 2, m) if m >= HALVED else (0, m)

        def look(q, k, v):
            prompt = [part[:, :length] for part in (q, k, v)]
            own = [part[:, length:].reshape(p, f, m, *part.shape[2:]) for part in (q, k, v)]
            shared = Part(prompt[1], prompt[2], mask[:, None, None])
            out = []
            for first, end in pairwise(bounds):
                seen = Part(own[1][:, :, :end], own[2][:, :, :end], visible[:, :, first:end, :end])
                out.append(self._attend(own[0][:, :, first:end], seen, shared))
            out = jnp.concatenate(out, axis=2).reshape(p, f * m, *q.shape[2:])
            return jnp.concatenate([self._prompt_attention(*prompt, mask), out], axis=1), None

        stream = constrain(jnp.concatenate([x, nodes.reshape(p, f * m, -1)], axis=1))
        stream, _ = run_layers(
            self.layers, lambda layer, x, _: layer(x, tables, look, use_lora), stream, None, remat=remat
        )
        stream = self.norm(stream)
        return stream[:, :length], stream[:, length:].reshape(p, f, m, -1)

    def _attend(self, q, *parts: Part):
        return recomputed(partial(attend, scale=self.config.attention_multiplier))(q, *parts)

    def _prompt_attention(self, q, k, v, mask):
        causal = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))[None, None]
        own_mask = causal & mask[:, None, None, :]
        return self._attend(q[:, None], Part(k[:, None], v[:, None], own_mask))[:, 0]

    def _tables(self, positions: Int[Array, "P N"]):
        return rotary_tables(positions, theta=self.config.rope_theta, head_dim=self.config.head_dim)


def grow_cache(cache: Any, slots: int) -> Any:
    """Return a cache with empty slots behind its own, so many in all."""

    def pad(store):
        return jnp.pad(store, [(0, 0)] * (store.ndim - 2) + [(0, slots - store.shape[-2]), (0, 0)])

    return jax.tree.map(pad, cache)


def thin_cache(cache: Any, rows: Int[Array, "P g"]) -> Any:
    """Return the cache of these samples of each prompt alone."""

    def take(store):
        index = rows.reshape((1,) * (store.ndim - 5) + rows.shape + (1, 1, 1))
        return jnp.take_along_axis(store, index, axis=-4)

    return jax.tree.map(take, cache)


def _write(cache: Cache, index, t, *new: Float[Array, "P G 1 K h"]):
    """Write slot t of a layer's keys and values, in place; return the cache, and these two [P, G, T, K, h]."""
    new = [item.swapaxes(2, 3) for item in new]
    if isinstance(cache, list):
        pairs = zip(cache[index], new, strict=True)
        own = tuple(
            jax.lax.dynamic_update_slice_in_dim(store, item.astype(store.dtype), t, axis=3) for store, item in pairs
        )
        cache = [*cache[:index], own, *cache[index + 1 :]]
    else:
        pairs = zip(cache, new, strict=True)
        cache = tuple(
            jax.lax.dynamic_update_slice(store, item[None].astype(store.dtype), (index, 0, 0, 0, t, 0))
            for store, item in pairs
        )
        own = tuple(jax.lax.dynamic_index_in_dim(store, index, keepdims=False) for store in cache)
    return cache, tuple(store.swapaxes(2, 3) for store in own)
