"""A tiny policy with random weights, and batches and programs for it; nothing here needs torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jgrpo.steps import make_programs
from model_port.batch import Batch
from model_port.config import GraniteSpeechConfig
from model_port.params import select, split_model
from model_port.partition import MeshConfig, make_mesh, param_shardings
from model_port.weights.tree import abstract_model

TINY = GraniteSpeechConfig.tiny()
# Embeddings that do not drown what the layers add: otherwise every token would predict itself.
CONFIG = dataclasses.replace(
    TINY,
    encoder=dataclasses.replace(TINY.encoder, num_layers=2),
    decoder=dataclasses.replace(
        TINY.decoder, num_hidden_layers=2, embedding_multiplier=1.5, residual_multiplier=0.8, logits_scaling=0.7
    ),
)
TRAINABLE = ("projector", "lora", "decoder.layers.mlp.gate_proj.kernel")


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
    """Return random features of a clip [A, 160]."""
    return np.random.default_rng(1000 + seed).normal(size=(frames, 160)).astype(np.float32)


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
    rows = []
    for prompt in prompts:
        ids, slots, index = [], [], 0
        for item in prompt:
            if isinstance(item, int):
                ids, slots = [*ids, item], [*slots, -1]
                continue
            count = queries * -(-len(item) // window)
            first = index * queries * -(-a // window)
            ids, slots, index = [*ids, *[config.audio_token_id] * count], [*slots, *range(first, first + count)], index + 1
        rows.append((ids, slots))
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


def keep_gradient():
    """An optimiser that leaves the parameters alone and keeps the gradient as its state."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def make_policy(config=CONFIG, *, objective, mesh=(1, 1, 1), trainable=TRAINABLE, optimiser=None, seed=0, **options):
    """Return (programs, trained, frozen, mesh) as jgrpo.setup makes them: parameters laid out over the mesh."""
    mesh = make_mesh(MeshConfig(*mesh))
    definition, params = make_params(config, seed)
    shardings = param_shardings(nnx.state(abstract_model(config)), mesh)
    params = {name: jax.device_put(value, shardings[name]) for name, value in params.items()}
    chosen = set(select(definition, trainable))
    programs = make_programs(
        definition,
        mesh=mesh,
        optimiser=optimiser or keep_gradient(),
        objective=objective,
        trainable=tuple(chosen),
        **options,
    )
    trained = {name: value for name, value in params.items() if name in chosen}
    return programs, trained, {name: value for name, value in params.items() if name not in chosen}, mesh
