# SPDX-License-Identifier: Apache-2.0
"""What a step needs at least, by arithmetic alone: cheap enough to sort out mesh shapes before any is compiled."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from jgrpo.planning.arrays import (
    DECODER,
    LONGEST,
    Arrays,
    Clip,
    Lengths,
    chip_bytes,
    decoder_flops,
    encoder_flops,
    parameters,
    score_flops,
    update_flops,
)
from jgrpo.planning.chips import HOP_SECONDS, Chip


@dataclass(frozen=True)
class Estimate:
    """Bytes of HBM that a chip needs at least, and seconds of a step."""

    memory: float
    seconds: float


def estimate(run: Arrays, clip: Clip, chip: Chip, lengths: Lengths = LONGEST) -> Estimate:
    """Return the estimate for prompts with a clip of this bucket: of memory for the longest completions."""
    resident = chip_bytes([run.state, run.ref_params, run.frozen])
    return Estimate(resident + max(_cache(run, clip), _update(run, clip)), _seconds(run, clip, chip, lengths))


def _rows(run: Arrays) -> int:
    """Prompts of one chip."""
    mesh = run.config.mesh
    return -(-run.config.prompts_per_step // (mesh.data * mesh.fsdp))


def _width(run: Arrays) -> int:
    return jnp.dtype(run.config.model.dtype).itemsize


def _cache(run: Arrays, clip: Clip) -> float:
    """Bytes of the keys and values of a rollout; supervised training has none."""
    if not run.is_grpo:
        return 0.0
    decoder = run.model.decoder
    tokens = clip.tokens + run.num_samples * run.config.max_completion_tokens
    heads = decoder.num_key_value_heads / run.config.mesh.tensor
    rows = _rows(run) / run.config.grpo.rollout_chunks
    return 2.0 * rows * tokens * decoder.num_hidden_layers * heads * decoder.head_dim * _width(run)


def _update(run: Arrays, clip: Clip) -> float:
    """Bytes of gradients, of what the backward pass keeps of each layer, and of one layer's attention and logits."""
    config, decoder = run.config, run.model.decoder
    minibatches = config.grpo.num_minibatches if run.is_grpo else 1
    rows = _rows(run) / (minibatches * config.micro_batches)
    own = run.num_samples * config.max_completion_tokens
    tokens, heads = clip.tokens + own, decoder.num_attention_heads / config.mesh.tensor
    stream = rows * tokens * decoder.hidden_size * _width(run)
    inner = rows * tokens * (decoder.intermediate_size * 3 / config.mesh.tensor + decoder.hidden_size) * _width(run)
    scores = 4.0 * rows * heads * (clip.tokens**2 + own * (clip.tokens + config.max_completion_tokens))
    kept = stream if config.model.remat == "full" else stream + inner + scores
    gradients = chip_bytes(run.state.params) * (2 if config.micro_batches > 1 else 1)
    return gradients + decoder.num_hidden_layers * kept + inner + scores


def _seconds(run: Arrays, clip: Clip, chip: Chip, lengths: Lengths) -> float:
    """Seconds of a step: of every program, the longer of its products and of what is sent for them."""
    config, mesh, decoder = run.config, run.config.mesh, run.model.decoder
    weights = (parameters(run, DECODER)[0] + decoder.vocab_size * decoder.hidden_size) * _width(run) / mesh.tensor
    gathered = weights * (mesh.fsdp - 1) / mesh.fsdp
    passes = 4 if config.model.remat == "full" else 3
    prompts, layout = config.prompts_per_step, lengths.layout(run, clip)

    def reduced(own: int) -> float:
        """Return the bytes that are summed over the tensor axis, for so many tokens beside each prompt's."""
        size = 2 * decoder.num_hidden_layers * _rows(run) * (clip.tokens + own) * decoder.hidden_size * _width(run)
        return 2 * size * (mesh.tensor - 1) / mesh.tensor

    # Two sums over the tensor axis in every layer, of every token that is decoded.
    hops = 2 * decoder.num_hidden_layers * (mesh.tensor if mesh.tensor > 1 else 0)

    def seconds(flops: float, sent: float) -> float:
        return max(flops / mesh.size / chip.flops, sent / chip.ici_bandwidth)

    total = 0.0 if config.data.cache_encoder else seconds(encoder_flops(run, clip, prompts), 0.0)
    updates, learnt = 1, reduced(layout[0] * layout[1])
    if run.is_grpo:
        whole = (run.num_samples, config.max_completion_tokens)
        decoded = whole[1] * (config.grpo.rollout_chunks * weights + _cache(run, clip) / 2)
        waited = hops * whole[1] * config.grpo.rollout_chunks * HOP_SECONDS
        sampled = seconds(decoder_flops(run, clip, prompts, whole), gathered + reduced(whole[0] * whole[1]))
        total += max(sampled + waited, decoded / chip.hbm_bandwidth)
        scored = seconds(score_flops(run, clip, prompts, layout), gathered + learnt)
        total += scored if config.grpo.beta > 0 else 0.0
        updates = config.grpo.num_iterations
        gathered *= config.grpo.num_minibatches
    sent = config.micro_batches * (passes - 1) * gathered + passes / 2 * learnt
    return total + updates * seconds(update_flops(run, clip, prompts, layout), sent)


def meshes(chips: int) -> list[tuple[int, int, int]]:
    """Return every (data, fsdp, tensor) of so many chips."""
    return [
        (chips // (fsdp * tensor), fsdp, tensor) for tensor in divisors(chips) for fsdp in divisors(chips // tensor)
    ]


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, in rising order."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
