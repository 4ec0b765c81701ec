"""Train the demo's conformer as a character recogniser (CTC), before it ever meets a language model.

The encoder is otherwise frozen in the demo, as the paper's recipe leaves it; here it learns to hear. Its batch norms
keep their stored statistics (mean 0, variance 1) throughout, so training and use compute the same thing.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from model_port.audio import load_audio
from model_port.features import log_mel
from model_port.params import ModelDef, Params

ALPHABET = " abcdefghijklmnopqrstuvwxyz'"  # label i + 1; label 0 is the CTC blank
FRAME_STEP = 25  # batches are padded to multiples of this many frames, which bounds the number of compilations
FINAL_WEIGHT, MIDDLE_WEIGHT = 0.7, 0.3


def load_corpus(manifest: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the features [A, 160] and character labels of every clip in a manifest of transcripts."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    features = [log_mel(load_audio(manifest.parent / row["audio"])) for row in rows]
    labels = [np.array([ALPHABET.index(c) + 1 for c in row["reference"]], np.int32) for row in rows]
    return features, labels


def batches(
    features, labels, *, size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (features, lengths, labels, label mask) without end; clips of like length share a batch."""
    rng = np.random.default_rng(seed)
    width = max(len(label) for label in labels)
    while True:
        order = sorted(range(len(features)), key=lambda i: len(features[i]) + rng.uniform(-15, 15))
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        for index in rng.permutation(len(groups)):
            clips = [mask_spectrum(features[i], rng) for i in groups[index]]
            frames = FRAME_STEP * -(-max(map(len, clips)) // FRAME_STEP)
            x = np.stack([np.pad(clip, ((0, frames - len(clip)), (0, 0))) for clip in clips])
            text = [labels[i] for i in groups[index]]
            y = np.stack([np.pad(label, (0, width - len(label))) for label in text])
            mask = np.arange(width)[None] < np.array([len(label) for label in text])[:, None]
            yield x, np.array([len(clip) for clip in clips], np.int32), y, mask


def mask_spectrum(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blank two short spans of frames and one band of mels with the clip's mean (SpecAugment, arXiv 1904.08779)."""
    clip, fill = clip.copy(), clip.mean()
    for _ in range(2):
        span = int(rng.integers(0, 9))
        start = int(rng.integers(0, max(len(clip) - span, 1)))
        clip[start : start + span] = fill
    span = int(rng.integers(0, 10))
    start = int(rng.integers(0, 80 - span))
    for half in (0, 80):  # a stacked frame holds two mel frames
        clip[:, half + start : half + start + span] = fill
    return clip


def train_encoder(definition: ModelDef, params: Params, manifest: Path, *, steps: int = 600, seed: int = 0) -> Params:
    """Return the parameters with the encoder trained by CTC on its last and middle block."""
    trainable = {name: value for name, value in params.items() if name.startswith("encoder.")}
    trainable = {name: value for name, value in trainable.items() if name not in definition.stats}
    frozen = {name: value for name, value in params.items() if name not in trainable}
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, steps, 6e-5)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))

    def loss_fn(trainable, frozen, x, lengths, y, mask):
        last, middle = definition.bind(trainable, frozen).encoder.ctc_logits(x, lengths)
        padding = (jnp.arange(x.shape[1])[None] >= lengths[:, None]).astype(jnp.float32)
        losses = [optax.ctc_loss(logits, padding, y, 1.0 - mask) for logits in (last, middle)]
        return (FINAL_WEIGHT * losses[0] + MIDDLE_WEIGHT * losses[1]).sum() / mask.sum()

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(trainable, state, frozen, *batch):
        loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, *batch)
        updates, state = optimiser.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    trainable = jax.tree.map(jnp.copy, trainable)
    state = optimiser.init(trainable)
    features, labels = load_corpus(manifest)
    stream = batches(features, labels, size=32, seed=seed)
    for step, batch in zip(range(steps), stream, strict=False):
        trainable, state, loss = update(trainable, state, frozen, *batch)
        if step % 50 == 0 or step == steps - 1:
            print(f"ctc step {step + 1}/{steps}  loss per character {float(loss):.3f}", flush=True)  # noqa: T201
    return {**params, **trainable}


def word_errors(definition: ModelDef, params: Params, manifest: Path) -> float:
    """Return the word error rate of greedy CTC decoding over a manifest with a `transcript` column."""
    from jgrpo.rewards.wer import corpus_wer

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    encode = jax.jit(lambda params, x, n: definition.bind(params).encoder.ctc_logits(x, n)[0].argmax(-1))
    heard, spoken = [], []
    for row in rows:
        clip = log_mel(load_audio(manifest.parent / row["audio"]))
        x = np.pad(clip, ((0, 150 - len(clip)), (0, 0)))[None]
        ids = np.asarray(encode(params, x, np.array([len(clip)], np.int32)))[0, : len(clip)]
        ids = [i for i, previous in zip(ids, [0, *ids[:-1]], strict=True) if i != previous and i != 0]
        heard.append("".join(ALPHABET[i - 1] for i in ids))
        spoken.append("".join(c for c in row["transcript"].lower() if c in ALPHABET))
    return corpus_wer(heard, spoken)
