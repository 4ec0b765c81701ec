"""What a step must do at the least: useful FLOPs and bytes by formula, and what the device reaches, measured beside it.

Useful are the matrix products of the forward pass, their gradients, and in attention only the pairs that the mask
leaves. What is computed a second time (the logits of a chunk, layers under remat) is done but not useful.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Timing
from jgrpo.planning.arrays import DECODER, ENCODER, Arrays, Clip, parameters

# Of the projector: what runs on every frame, and what runs on every query.
FRAMES = re.compile(r"projector\.layers\.cross_attn\.(key|value)\.kernel")
QUERIES = re.compile(r"projector\.(?!layers\.cross_attn\.(key|value)\.).*kernel")


class Peak:
    """What the default device reaches on what it does best, to be measured beside the rest.

    Attributes:
        flops: of a call of `matrix`.
        nbytes: that a call of `stream` reads and writes.
    """

    def __init__(self, dtype: str):
        cpu = jax.default_backend() == "cpu"
        # Beyond the caches, and not many times more.
        width, length, count = (1536, 2**26, 2) if cpu else (8192, 2**30, 8)

        @jax.jit
        def chain(x, weights):
            for _ in range(count):
                x = x @ weights
            return x

        self._chain, self._square = chain, jnp.full((width, width), 1 / width, dtype)
        # In place: new memory costs a CPU more than reading and writing it.
        self._add, self._long = jax.jit(lambda x: x + 1, donate_argnums=0), jnp.ones(length, jnp.float32)
        self.flops, self.nbytes = 2.0 * count * width**3, 2.0 * self._long.nbytes

    def matrix(self) -> jax.Array:
        """Multiply square matrices."""
        return self._chain(self._square, self._square)

    def stream(self) -> jax.Array:
        """Read and write a long array."""
        self._long = self._add(self._long)
        return self._long

    def flops_per_second(self, timing: Timing) -> float:
        """Return the rate of `matrix` in its best round."""
        return self.flops / timing.low

    def bytes_per_second(self, timing: Timing) -> float:
        """Return the rate of `stream` in its best round."""
        return self.nbytes / timing.low


def _head(run: Arrays) -> tuple[int, bool]:
    """Return the size of the matrix that makes logits, and whether it is trained."""
    name = "decoder.embed_tokens.embedding" if run.model.tie_word_embeddings else "lm_head.kernel"
    return run.model.decoder.vocab_size * run.model.decoder.hidden_size, name in run.ref_params


def _attention(run: Arrays, pairs: float) -> float:
    """Return the FLOPs of scores and weighted values for so many pairs of query and key."""
    decoder = run.model.decoder
    return 4.0 * decoder.num_hidden_layers * decoder.num_attention_heads * decoder.head_dim * pairs


def _prompt_pairs(length: int) -> float:
    return length * (length + 1) / 2


def encode_flops(run: Arrays, clip: Clip, prompts: int) -> float:
    """Return the useful FLOPs of encoding one clip of every prompt; its attention, a small part, is left out."""
    return 2.0 * prompts * clip.frames * parameters(run, ENCODER)[0]


def _projection(run: Arrays, clip: Clip) -> list[tuple[tuple[int, int], int]]:
    slots = run.model.projector.num_slots(clip.frames)
    return [(parameters(run, FRAMES), clip.frames), (parameters(run, QUERIES), slots)]


def prefill_flops(run: Arrays, clip: Clip, prompts: int) -> float:
    """Return the useful FLOPs from the encoder's output to the first logits of every prompt."""
    parts = [*_projection(run, clip), (parameters(run, DECODER), clip.tokens)]
    products = sum(2.0 * size * tokens for (size, _), tokens in parts) + 2.0 * _head(run)[0]
    return prompts * (products + _attention(run, _prompt_pairs(clip.tokens)))


def token_step_flops(run: Arrays, clip: Clip, rows: int, new_tokens: int) -> float:
    """Return the useful FLOPs of decoding one token of every row, at the mean length of the completions."""
    products = 2.0 * (parameters(run, DECODER)[0] + _head(run)[0])
    return rows * (products + _attention(run, clip.tokens + new_tokens / 2))


def token_step_bytes(run: Arrays, clip: Clip, prompts: int, samples: int, new_tokens: int) -> float:
    """Return the bytes that one token step must read: weights once, and the keys and values that are there by then."""
    decoder, width = run.model.decoder, jnp.dtype(run.config.model.dtype).itemsize
    slots = prompts * (clip.tokens + samples * new_tokens / 2)
    cache = 2.0 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * slots
    return width * (parameters(run, DECODER)[0] + _head(run)[0] + cache)


def update_flops(run: Arrays, clip: Clip, prompts: int, samples: int, new_tokens: int) -> float:
    """Return the useful FLOPs of an update: forward, the gradient of what comes in, and that of what is trained."""
    inputs = samples * (new_tokens - 1)  # the last token of a completion is predicted and never read
    head, head_trained = _head(run)
    parts = [*_projection(run, clip), (parameters(run, DECODER), clip.tokens + inputs)]
    parts.append(((head, head * head_trained), samples * new_tokens))
    pairs = _prompt_pairs(clip.tokens) + samples * ((new_tokens - 1) * clip.tokens + _prompt_pairs(new_tokens - 1))
    products = sum(2.0 * tokens * (2 * size + trained) for (size, trained), tokens in parts)
    return prompts * (products + 3 * _attention(run, pairs))


def fitted_exponent(sizes: list[float], seconds: list[float]) -> float:
    """Return the exponent of the power of size that fits best, by least squares of logarithms.

    >>> round(fitted_exponent([1, 4, 16], [3, 12, 48]), 3)
    1.0
    """
    return float(np.polyfit([math.log(size) for size in sizes], [math.log(value) for value in seconds], 1)[0])
