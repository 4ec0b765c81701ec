"""A tiny model with random weights, batches for it, and what a plain pass over whole sequences says of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from model_port.batch import Batch
from model_port.config import GraniteSpeechConfig
from model_port.params import split_model
from model_port.weights.tree import abstract_model

TINY = GraniteSpeechConfig.tiny()
# Embeddings that do not drown what the layers add: otherwise every token would predict itself.
CONFIG = dataclasses.replace(
    TINY,
    encoder=dataclasses.replace(TINY.encoder, num_layers=2),
    decoder=dataclasses.replace(
        TINY.decoder, num_hidden_layers=2, embedding_multiplier=1.5, residual_multiplier=0.8, logits_scaling=1.3
    ),
    eos_token_ids=tuple(range(100, 115)),
)
P, G, T = 8, 3, 6


def make_params(config=CONFIG, seed=0):
    """Return (definition, {name: NumPy array}); every value is random, BatchNorm statistics and the adapter's B too."""
    definition, shapes = split_model(abstract_model(config))
    rng = np.random.default_rng(seed)
    return definition, {name: _random(name, leaf.shape, rng) for name, leaf in sorted(shapes.items())}


def make_model(config=CONFIG, seed=0):
    """Return the model of `make_params`."""
    definition, params = make_params(config, seed)
    return definition.bind(jax.tree.map(jnp.asarray, params))


def _random(name, shape, rng):
    if name.endswith(".var"):
        value = rng.uniform(0.5, 2.0, shape)
    elif name.endswith(".scale"):
        value = rng.normal(1.0, 0.2, shape)
    elif name.endswith((".bias", ".mean")):
        value = rng.normal(0.0, 0.2, shape)
    else:
        fan_in = shape[1] if ".layers." in name else shape[0]
        value = rng.normal(0.0, 0.3 if "embedding" in name else fan_in**-0.5, shape)
    return value.astype(np.float32)


def clip(frames, seed=0):
    """Return random features of a clip [A, 160], around a mean of its own so that clips do not sound alike."""
    rng = np.random.default_rng(1000 + seed)
    return (rng.normal(size=160) + rng.normal(size=(frames, 160))).astype(np.float32)


def make_batch(config, prompts, *, frames=0, tokens=0, clips=0, garbage=0.0):
    """Collate prompts, each a list of token ids and clips in order; sizes are the least to pad to.

    Args:
        garbage: scale of random numbers that stand in the padded frames, instead of zeros.
    """
    rng = np.random.default_rng(7)
    window, queries = config.projector.window_size, config.projector.num_queries
    found = [[item for item in prompt if not isinstance(item, int)] for prompt in prompts]
    a = max([frames, 1, *(len(item) for row in found for item in row)])
    c = max([clips, *(len(row) for row in found)])
    rows = [_expand(config, prompt, stride=queries * -(-a // window)) for prompt in prompts]
    length = max([tokens, *(len(ids) for ids, _ in rows)])
    features = garbage * rng.normal(size=(len(prompts), c, a, config.encoder.input_dim)).astype(np.float32)
    lengths = np.zeros((len(prompts), c), np.int32)
    for p, row in enumerate(found):
        for k, item in enumerate(row):
            features[p, k, : len(item)], lengths[p, k] = item, len(item)
    return Batch(
        tokens=np.array([ids + [config.pad_token_id] * (length - len(ids)) for ids, _ in rows], np.int32),
        mask=np.array([[True] * len(ids) + [False] * (length - len(ids)) for ids, _ in rows]),
        audio_slots=np.array([slots + [-1] * (length - len(slots)) for _, slots in rows], np.int32),
        features=features.astype(np.float32),
        lengths=lengths,
    )


def _expand(config, prompt, *, stride):
    """Return the token ids of a prompt, one placeholder per audio embedding, and the slot of each; -1 is text."""
    window, queries = config.projector.window_size, config.projector.num_queries
    ids, slots, first = [], [], 0
    for item in prompt:
        if isinstance(item, int):
            ids.append(item)
            slots.append(-1)
        else:
            count = queries * -(-len(item) // window)
            ids += [config.audio_token_id] * count
            slots += range(first, first + count)
            first += stride
    return ids, slots


PROMPTS = [
    [5, clip(13, 1), 17, 3],
    [8, 9, clip(37, 2), 4],
    [1, 2, 3, clip(20, 3), 4, 5, clip(7, 4), 6],
    [clip(21, 5), 11, 12, 13],
    [5, clip(16, 6), 17, 3],
    [42, 43, 44, clip(30, 7), 45],
    [clip(1, 8), 2, clip(40, 9), 3],
    [60, 61, 62, 63, 64, 65, clip(25, 10)],
]


def extend(batch, tokens):
    """Return the batch of P * G rows in which each completion of `tokens` [P, G, T] follows its prompt in full."""
    p, g, t = tokens.shape
    rows = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), g, axis=0), batch)
    length = rows.tokens.shape[1]
    ids, slots = (np.pad(leaf, ((0, 0), (0, t)), constant_values=-1) for leaf in (rows.tokens, rows.audio_slots))
    ends = rows.mask.sum(-1)
    for row, (end, completion) in enumerate(zip(ends, np.asarray(tokens).reshape(p * g, t), strict=True)):
        ids[row, end : end + t] = completion
    return Batch(
        tokens=np.maximum(ids, 0),
        mask=np.arange(length + t)[None] < ends[:, None] + t,
        audio_slots=slots,
        features=rows.features,
        lengths=rows.lengths,
    )


def log_probs(logits, *, forbidden, temperature=1.0):
    """Return log softmax [..., V] in float64 of logits / temperature, without the forbidden token."""
    logits = np.array(logits, np.float64) / temperature
    logits[..., forbidden] = -np.inf
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def full_forward(model, batch, tokens, **options):
    """Return the log-probs [P, G, T, V] of every completion position, from one pass over whole sequences."""
    p, g, t = tokens.shape
    logits = np.asarray(model(extend(batch, tokens)))
    first = np.repeat(np.asarray(batch.mask).sum(-1), g)[:, None] - 1 + np.arange(t)[None]
    logits = np.take_along_axis(logits, first[:, :, None], axis=1).reshape(p, g, t, -1)
    return log_probs(logits, forbidden=model.config.audio_token_id, **options)


def at(logp, tokens):
    """Return logp [..., V] at the tokens [...]."""
    return np.take_along_axis(logp, np.asarray(tokens)[..., None], axis=-1)[..., 0]
