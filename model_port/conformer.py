# SPDX-License-Identifier: Apache-2.0
"""The conformer CTC encoder: stacked log-mel frames to acoustic embeddings.

Padding is exact: whatever stands in frames at or beyond a clip's length, its embeddings are those of the clip alone.
Three masks do it: attention never looks at padded keys, the depthwise convolution sees zeros there, and the output is
zero there. Source: transformers GraniteSpeechCTCEncoder.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model_port.config import EncoderConfig
from model_port.layers import MASKED, Embedding, LayerNorm, Linear, align, contract, parameter, run_layers
from model_port.partition import constrain

NORM_EPS = 1e-5  # torch LayerNorm and BatchNorm1d default


class FeedForward(nnx.Module):
    """Half of the macaron pair: LN, widen, SiLU, narrow."""

    def __init__(self, config: EncoderConfig, **kw):
        width, inner = config.hidden_dim, config.hidden_dim * config.feedforward_mult
        self.pre_norm = LayerNorm(width, eps=NORM_EPS, **kw)
        self.up_proj = Linear(width, inner, axes=("enc_embed", "enc_mlp"), **kw)
        self.down_proj = Linear(inner, width, axes=("enc_mlp", "enc_embed"), **kw)

    def __call__(self, x: Float[Array, "B A E"]) -> Float[Array, "B A E"]:
        return self.down_proj(jax.nn.silu(self.up_proj(self.pre_norm(x))))


class BlockAttention(nnx.Module):
    """Self-attention inside blocks of `context_size` frames with Shaw's relative positions (arXiv 1803.02155)."""

    def __init__(self, config: EncoderConfig, **kw):
        width, inner = config.hidden_dim, config.num_heads * config.dim_head
        self.pre_norm = LayerNorm(width, eps=NORM_EPS, **kw)
        self.to_q = Linear(width, inner, axes=("enc_embed", "enc_heads"), bias=False, **kw)
        self.to_kv = Linear(width, (2, inner), axes=("enc_embed", None, "enc_heads"), bias=False, **kw)
        self.to_out = Linear(inner, width, axes=("enc_heads", "enc_embed"), **kw)
        self.rel_pos_emb = Embedding(2 * config.max_pos_emb + 1, config.dim_head, axes=(None, None), **kw)
        self.num_heads, self.dim_head = config.num_heads, config.dim_head
        self.context_size, self.max_pos_emb = config.context_size, config.max_pos_emb

    def __call__(self, x: Float[Array, "B A E"], valid: Bool[Array, "B A"]) -> Float[Array, "B A E"]:
        batch, frames, _ = x.shape
        block = min(self.context_size, frames)
        num_blocks = -(-frames // block)
        pad = num_blocks * block - frames
        u = jnp.pad(self.pre_norm(x), ((0, 0), (0, pad), (0, 0)))
        shape = (batch, num_blocks, block, self.num_heads, self.dim_head)
        q = self.to_q(u).reshape(shape)
        k, v = (part.reshape(shape) for part in jnp.moveaxis(self.to_kv(u), -2, 0))
        offsets = jnp.arange(block)
        distance = self.rel_pos_emb(offsets[:, None] - offsets[None, :] + self.max_pos_emb).astype(x.dtype)
        scores = contract("bnchd,bnrhd->bnhcr", q, k) + contract("bnchd,crd->bnhcr", q, distance)
        keys = jnp.pad(valid, ((0, 0), (0, pad))).reshape(batch, num_blocks, 1, 1, block)
        scores = jnp.where(keys, scores * self.dim_head**-0.5, MASKED)
        out = contract("bnhcr,bnrhd->bnchd", jax.nn.softmax(scores, axis=-1).astype(x.dtype), v).astype(x.dtype)
        return self.to_out(out.reshape(batch, num_blocks * block, -1)[:, :frames])


class BatchNorm(nnx.Module):
    """Normalisation by stored statistics, never by those of the batch, so that no clip depends on its batch mates."""

    def __init__(self, width: int, *, rngs, stack, dtype):
        common = {"rngs": rngs, "stack": stack, "dtype": dtype}
        axes = ("layers",) * len(stack) + (None,)
        self.scale = parameter((width,), (None,), init="ones", **common)
        self.bias = parameter((width,), (None,), init="zeros", **common)
        self.mean = nnx.BatchStat(jnp.zeros((*stack, width), dtype), axes=axes)
        self.var = nnx.BatchStat(jnp.ones((*stack, width), dtype), axes=axes)

    def __call__(self, x: Float[Array, "B A X"]) -> Float[Array, "B A X"]:
        mean, var, scale, bias = (p[...].astype(jnp.float32) for p in (self.mean, self.var, self.scale, self.bias))
        gain = scale * jax.lax.rsqrt(var + NORM_EPS)
        return (x.astype(jnp.float32) * align(gain, x) + align(bias - mean * gain, x)).astype(x.dtype)


class DepthwiseConv(nnx.Module):
    """One filter per channel over time, without bias."""

    def __init__(self, width: int, size: int, *, rngs, stack, dtype):
        self.kernel = parameter((size, width), (None, "enc_mlp"), rngs=rngs, stack=stack, dtype=dtype, init="normal")

    def __call__(self, x: Float[Array, "B A X"]) -> Float[Array, "B A X"]:
        kernel = self.kernel[...].astype(x.dtype)
        size, frames = kernel.shape[0], x.shape[1]
        left = size // 2
        padded = jnp.pad(x, ((0, 0), (left, size - 1 - left), (0, 0)))
        # A sum of shifted products fuses into one loop; XLA's grouped convolution is many times slower on CPU.
        out = sum(padded[:, i : i + frames].astype(jnp.float32) * align(kernel[i], x) for i in range(size))
        return out.astype(x.dtype)


class ConvModule(nnx.Module):
    """LN, gated pointwise convolution, depthwise convolution, batch norm, SiLU, pointwise convolution."""

    def __init__(self, config: EncoderConfig, **kw):
        width, inner = config.hidden_dim, config.hidden_dim * config.conv_expansion_factor
        self.norm = LayerNorm(width, eps=NORM_EPS, **kw)
        self.up_conv = Linear(width, (2, inner), axes=("enc_embed", None, "enc_mlp"), **kw)
        self.depth_conv = DepthwiseConv(inner, config.conv_kernel_size, **kw)
        self.batch_norm = BatchNorm(inner, **kw)
        self.down_conv = Linear(inner, width, axes=("enc_mlp", "enc_embed"), **kw)

    def __call__(self, x: Float[Array, "B A E"], valid: Bool[Array, "B A"]) -> Float[Array, "B A E"]:
        value, gate = jnp.moveaxis(self.up_conv(self.norm(x)), -2, 0)
        gated = value * jax.nn.sigmoid(gate) * valid[:, :, None].astype(x.dtype)
        return self.down_conv(jax.nn.silu(self.batch_norm(self.depth_conv(gated))))


class Block(nnx.Module):
    """One conformer block."""

    def __init__(self, config: EncoderConfig, **kw):
        self.ff1 = FeedForward(config, **kw)
        self.attn = BlockAttention(config, **kw)
        self.conv = ConvModule(config, **kw)
        self.ff2 = FeedForward(config, **kw)
        self.post_norm = LayerNorm(config.hidden_dim, eps=NORM_EPS, **kw)

    def __call__(self, x: Float[Array, "B A E"], valid: Bool[Array, "B A"]) -> Float[Array, "B A E"]:
        x = x + 0.5 * self.ff1(x)
        x = x + self.attn(x, valid)
        x = x + self.conv(x, valid)
        x = x + 0.5 * self.ff2(x)
        return self.post_norm(x)


class Encoder(nnx.Module):
    """The stack of blocks, with the CTC posterior of the middle block fed back into the stream."""

    def __init__(self, config: EncoderConfig, *, rngs, dtype=jnp.float32):
        kw = {"rngs": rngs, "dtype": dtype}
        self.config = config
        self.input_linear = Linear(config.input_dim, config.hidden_dim, axes=(None, "enc_embed"), **kw)
        self.layers = Block(config, stack=(config.num_layers,), **kw)
        self.out = Linear(config.hidden_dim, config.output_dim, axes=("enc_embed", None), **kw)
        self.out_mid = Linear(config.output_dim, config.hidden_dim, axes=(None, "enc_embed"), **kw)

    def __call__(
        self, features: Float[Array, "B A M"], lengths: Int[Array, " B"], *, remat: str = "none"
    ) -> Float[Array, "B A X"]:
        """Encode clips; frames at or beyond a clip's length come out as zeros.

        The output has `config.embedding_dim` channels: the concatenated `cat_hidden_layers`, then the last layer.
        """
        last, taps = self.hidden_states(features, lengths, remat=remat)
        valid = jnp.arange(features.shape[1])[None, :] < lengths[:, None]
        out = jnp.concatenate([*(taps[i] for i in self.config.cat_hidden_layers), last], axis=-1)
        return out * valid[:, :, None].astype(out.dtype)

    def ctc_logits(
        self, features: Float[Array, "B A M"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B A O"], Float[Array, "B A O"]]:
        """Return the CTC head's float32 logits on the last and on the middle block, for training the encoder."""
        middle = self.config.num_layers // 2
        last, taps = self.hidden_states(features, lengths, taps=(middle,), before_feedback=True)
        return self.out(last).astype(jnp.float32), self.out(taps[middle]).astype(jnp.float32)

    def hidden_states(self, features, lengths, *, remat="none", taps=None, before_feedback=False):
        """Return the last block's output and {i: output of block i} for the tapped i; 0 is the input projection.

        The tap of the middle block includes the CTC feedback, as in the released "plus" encoder, unless
        `before_feedback`.
        """
        taps = self.config.cat_hidden_layers if taps is None else taps
        middle = self.config.num_layers // 2
        x = constrain(self.input_linear(features))
        valid = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
        kept = {0: x} if 0 in taps else {}

        def feedback(h):
            return h + self.out_mid(jax.nn.softmax(self.out(h), axis=-1))

        def body(layer, h, index):
            plain = layer(h, valid)
            h = constrain(jax.lax.cond(index == middle, feedback, lambda h: h, plain))
            return h, (plain if before_feedback else h) if any(taps) else None

        x, outputs = run_layers(self.layers, body, x, jnp.arange(1, self.config.num_layers + 1), remat=remat)
        kept.update({i: outputs[i - 1] for i in taps if i > 0})
        return x, kept
