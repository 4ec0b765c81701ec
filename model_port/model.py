# SPDX-License-Identifier: Apache-2.0
"""Granite Speech: what the audio encoder, the projector and the decoder compute together.

Source: transformers GraniteSpeechForConditionalGeneration. Unlike its releases 5.10 to 5.23, logits are divided by
`logits_scaling`, as the language model was trained and as earlier releases do.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model_port.batch import Batch, Trees
from model_port.config import GraniteSpeechConfig
from model_port.conformer import Encoder
from model_port.decoder import Decoder
from model_port.layers import MASKED, Linear, product
from model_port.qformer import Projector


class GraniteSpeech(nnx.Module):
    """The whole model. `model(batch)` gives logits; the parts below are what the jitted programs are made of.

    The released LoRA adapter, where the model has one, is on whenever there is audio, and is part of the policy.
    """

    def __init__(self, config: GraniteSpeechConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.dtype = jnp.dtype(dtype)  # of the computation; parameters are cast to it where they are used
        self.encoder = Encoder(config.encoder, rngs=rngs, dtype=dtype)
        self.projector = Projector(config.projector, config.decoder.hidden_size, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.decoder, config.lora, rngs=rngs, dtype=dtype)
        width, vocab = config.decoder.hidden_size, config.decoder.vocab_size + config.decoder.vocab_padding
        head = {"axes": ("embed", "vocab"), "bias": False, "rngs": rngs, "dtype": dtype}
        self.lm_head = None if config.tie_word_embeddings else Linear(width, vocab, **head)

    def __call__(self, batch: Batch, *, use_lora: bool | None = None) -> Float[Array, "P L V"]:
        """Return float32 logits of every prompt position, divided by `logits_scaling`.

        Args:
            use_lora: whether the adapter is on; by default it is when the batch holds audio.
        """
        return _forward(*nnx.split(self), batch, use_lora=has_audio(batch) if use_lora is None else use_lora)

    def encode_audio(self, batch: Batch) -> tuple[Float[Array, "P S D"], Bool[Array, "P S"]]:
        """Return the projected audio embeddings of every prompt and which of them are real, clip after clip."""
        return _encode_audio(*nnx.split(self), batch)

    def encode(
        self, features: Float[Array, "P C A M"], lengths: Int[Array, "P C"], *, remat: str = "none"
    ) -> Float[Array, "P C A X"]:
        """Return the encoder's output for every clip; frames past a clip's length are zero."""
        p, c, frames, width = features.shape
        if c == 0:
            return jnp.zeros((p, c, frames, self.config.encoder.embedding_dim), self.dtype)
        features = features.reshape(p * c, frames, width).astype(self.dtype)
        return self.encoder(features, lengths.reshape(p * c), remat=remat).reshape(p, c, frames, -1)

    def embed_prompts(self, batch: Batch, encoded: Float[Array, "P C A X"]) -> Float[Array, "P L D"]:
        """Return the decoder's input: token embeddings with the projected audio in its slots, times the multiplier."""
        text = self.decoder.embed_tokens(jnp.where(batch.audio_slots >= 0, 0, batch.tokens)).astype(self.dtype)
        if has_audio(batch):
            audio = self.project(encoded)
            slots = jnp.maximum(batch.audio_slots, 0)[:, :, None]
            audio = jnp.take_along_axis(audio, slots, axis=1).astype(text.dtype)
            text = jnp.where((batch.audio_slots >= 0)[:, :, None], audio, text)
        return text * jnp.asarray(self.config.decoder.embedding_multiplier, text.dtype)

    def embed_completions(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Return the decoder's input for text tokens, times the multiplier."""
        x = self.decoder.embed_tokens(tokens).astype(self.dtype)
        return x * jnp.asarray(self.config.decoder.embedding_multiplier, x.dtype)

    def project(self, encoded: Float[Array, "P C A X"]) -> Float[Array, "P S D"]:
        """Return the audio embeddings of every prompt, S slots for its C padded clips."""
        p, c, frames, width = encoded.shape
        if c == 0:
            return jnp.zeros((p, 0, self.config.decoder.hidden_size), self.dtype)
        return self.projector(encoded.reshape(p * c, frames, width)).reshape(p, -1, self.config.decoder.hidden_size)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return float32 logits, divided by `logits_scaling`."""
        return self._logits(hidden)[..., : self.config.decoder.vocab_size]

    def _logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B v"]:
        """Return the logits, and after them those of padding."""
        kernel = self.decoder.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        out = product(hidden, kernel.astype(hidden.dtype), 0, jnp.float32)
        return out / self.config.decoder.logits_scaling

    def policy_logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B v"]:
        """Return the logits a completion is sampled and scored with: `<|audio|>` and padding can never be written."""
        logits = self._logits(hidden)
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        forbidden = (ids == self.config.audio_token_id) | (ids >= self.config.decoder.vocab_size)
        return jnp.where(forbidden, MASKED, logits)

    def completion_hidden(
        self, batch: Batch, encoded: Float[Array, "P C A X"], trees: Trees, *, remat: str = "none"
    ) -> Float[Array, "P N D"]:
        """Return the hidden states that predict each node of the completions' prefix trees.

        The prompt is computed once per group, and so is what completions have in common at their beginning.
        """
        prompts, (p, f, m) = self.embed_prompts(batch, encoded), trees.ends.shape
        nodes = self.embed_completions(trees.tokens[:, : f * m]).reshape(p, f, m, -1)
        shape = (trees.depths, trees.ends)
        prompt, own = self.decoder.complete(prompts, batch.mask, nodes, *shape, use_lora=has_audio(batch), remat=remat)
        states = jnp.concatenate([last_hidden(prompt, batch.mask)[:, None], own.reshape(p, f * m, -1)], axis=1)
        return jnp.take_along_axis(states, trees.parents[:, :, None] + 1, axis=1)


def has_audio(batch: Batch) -> bool:
    """Whether a batch carries clips at all; known from shapes, so it is static under jit."""
    return batch.features.shape[1] > 0


def last_hidden(hidden: Float[Array, "P L D"], mask: Bool[Array, "P L"]) -> Float[Array, "P D"]:
    """Return the hidden state of each left-aligned prompt's last token."""
    index = mask.sum(-1, dtype=jnp.int32)[:, None, None] - 1
    return jnp.take_along_axis(hidden, index, axis=1)[:, 0]


@partial(jax.jit, static_argnums=0, static_argnames="use_lora")
def _forward(graph, state, batch: Batch, *, use_lora: bool):
    model = nnx.merge(graph, state)
    prompts = model.embed_prompts(batch, model.encode(batch.features, batch.lengths))
    hidden, _ = model.decoder.prefill(prompts, batch.mask, use_lora=use_lora)
    return model.logits(hidden)


@partial(jax.jit, static_argnums=0)
def _encode_audio(graph, state, batch: Batch):
    model = nnx.merge(graph, state)
    embeddings = model.project(model.encode(batch.features, batch.lengths))
    windows = -(-batch.lengths // model.config.projector.window_size)
    per_clip = model.config.projector.num_slots(batch.features.shape[2])
    mask = jnp.arange(per_clip)[None, None, :] < windows[:, :, None] * model.config.projector.num_queries
    return embeddings, mask.reshape(*mask.shape[:1], -1)
