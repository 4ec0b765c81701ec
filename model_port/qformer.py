# SPDX-License-Identifier: Apache-2.0
"""The windowed Q-Former: every 15 acoustic frames become 3 embeddings in the decoder's width.

Source: transformers GraniteSpeechEncoderProjector and Blip2QFormerModel.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model_port.config import ProjectorConfig
from model_port.layers import LayerNorm, Linear, contract, parameter, run_layers
from model_port.partition import constrain


class Attention(nnx.Module):
    """Attention with the residual and norm behind it (post-LN)."""

    def __init__(self, config: ProjectorConfig, memory_size: int, **kw):
        width = config.hidden_size
        self.query = Linear(width, width, axes=("proj_embed", "proj_heads"), **kw)
        self.key = Linear(memory_size, width, axes=("proj_embed", "proj_heads"), **kw)
        self.value = Linear(memory_size, width, axes=("proj_embed", "proj_heads"), **kw)
        self.out = Linear(width, width, axes=("proj_heads", "proj_embed"), **kw)
        self.norm = LayerNorm(width, eps=config.layer_norm_eps, **kw)
        self.num_heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "B q Q"], memory: Float[Array, "B w m"]) -> Float[Array, "B q Q"]:
        split = (-1, self.num_heads, x.shape[-1] // self.num_heads)
        q = self.query(x).reshape(x.shape[0], *split)
        k, v = (proj(memory).reshape(memory.shape[0], *split) for proj in (self.key, self.value))
        scores = contract("bqhd,bwhd->bhqw", q, k) * q.shape[-1] ** -0.5
        out = contract("bhqw,bwhd->bqhd", jax.nn.softmax(scores, axis=-1).astype(x.dtype), v)
        return self.norm(x + self.out(out.reshape(x.shape).astype(x.dtype)))


class FeedForward(nnx.Module):
    """Widen, exact GELU, narrow, residual and norm."""

    def __init__(self, config: ProjectorConfig, **kw):
        self.up = Linear(config.hidden_size, config.intermediate_size, axes=("proj_embed", "proj_mlp"), **kw)
        self.down = Linear(config.intermediate_size, config.hidden_size, axes=("proj_mlp", "proj_embed"), **kw)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **kw)

    def __call__(self, x: Float[Array, "B q Q"]) -> Float[Array, "B q Q"]:
        return self.norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Layer(nnx.Module):
    """Self-attention of the queries, cross-attention into the window, feed-forward."""

    def __init__(self, config: ProjectorConfig, **kw):
        self.self_attn = Attention(config, config.hidden_size, **kw)
        self.cross_attn = Attention(config, config.encoder_hidden_size, **kw)
        self.mlp = FeedForward(config, **kw)

    def __call__(self, x: Float[Array, "B q Q"], window: Float[Array, "B w m"]) -> Float[Array, "B q Q"]:
        return self.mlp(self.cross_attn(self.self_attn(x, x), window))


class Projector(nnx.Module):
    """Acoustic frames [B, A, X] to embeddings [B, S, D], S = queries * ceil(A / window).

    Frames must be zero where padded: the last window of a clip attends to its zero frames, as the reference does.
    """

    def __init__(self, config: ProjectorConfig, out_size: int, *, rngs, dtype=jnp.float32):
        kw = {"rngs": rngs, "dtype": dtype}
        self.config = config
        shape = (1, config.num_queries, config.hidden_size)
        self.query = parameter(shape, (None, None, None), rngs=rngs, stack=(), dtype=dtype, init="normal")
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **kw)
        self.layers = Layer(config, stack=(config.num_hidden_layers,), **kw)
        self.linear = Linear(config.hidden_size, out_size, axes=("proj_embed", None), **kw)

    def __call__(self, frames: Float[Array, "B A X"]) -> Float[Array, "B S D"]:
        batch, count, width = frames.shape
        window = self.config.window_size
        windows = -(-count // window)
        frames = jnp.pad(frames, ((0, 0), (0, windows * window - count), (0, 0)))
        frames = constrain(frames.reshape(batch * windows, window, width))
        query = self.layernorm(self.query[...].astype(frames.dtype))
        x = constrain(jnp.broadcast_to(query, (batch * windows, *query.shape[1:])))
        x, _ = run_layers(self.layers, lambda layer, x, _: (constrain(layer(x, frames)), None), x, None)
        return self.linear(x).reshape(batch, windows * self.config.num_queries, -1)
