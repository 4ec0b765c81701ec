# SPDX-License-Identifier: Apache-2.0
"""The arrays of a run as shapes, laid out over a mesh, and the FLOPs that follow from their sizes."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgrpo.config import GRPOConfig, RunConfig
from jgrpo.core.tree import Layout, layouts
from jgrpo.programs.steps import TrainState
from jgrpo.runtime.optimiser import make_optimiser
from jgrpo.setup import fresh_adapter
from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.features import SAMPLE_RATE, num_frames
from model_port.params import ModelDef, select, split_model
from model_port.partition import TRAINING, param_shardings, vocab_multiple
from model_port.published import PUBLISHED
from model_port.weights.config_files import read_config
from model_port.weights.tree import abstract_model

Shapes = dict[str, jax.ShapeDtypeStruct]

ENCODER = re.compile(r"encoder\.layers\..*kernel")
PROJECTOR = re.compile(r"projector\..*kernel")
DECODER = re.compile(r"decoder\.layers\..*(kernel|lora\.[ab])")
HEAD = re.compile(r"lm_head\.kernel")
# The largest group of a step, which decides the layout of all, over the mean: 1.2 where nothing is shared, up to 1.8.
LARGEST_GROUP = 1.5


@dataclass(frozen=True)
class Arrays:
    """What a run holds on its devices all the time.

    Attributes:
        ref_params: the trained parameters in the model's dtype, as they were loaded.
    """

    config: RunConfig
    model: GraniteSpeechConfig
    mesh: Mesh
    definition: ModelDef
    optimiser: optax.GradientTransformation
    state: TrainState
    ref_params: Shapes
    frozen: Shapes

    @property
    def is_grpo(self) -> bool:
        """Whether it is a run of GRPO, and not of supervised training."""
        return isinstance(self.config, GRPOConfig)

    @property
    def num_samples(self) -> int:
        """Completions of a prompt that are learnt from."""
        return self.config.grpo.num_samples if self.is_grpo else 1


@dataclass(frozen=True)
class Clip:
    """Padded lengths of a batch: A frames a clip, L tokens a prompt, for an audio bucket of so many seconds."""

    seconds: float
    frames: int
    tokens: int

    @classmethod
    def of(cls, run: Arrays, seconds: float) -> "Clip":
        """Return the lengths of a bucket, the text as long as the config allows, one clip a prompt."""
        frames = num_frames(round(SAMPLE_RATE * seconds))
        return cls(seconds, frames, run.config.data.max_prompt_tokens + run.model.projector.num_slots(frames))


@dataclass(frozen=True)
class Lengths:
    """What completions are taken to be like, where that is not the worst.

    Attributes:
        mean: tokens of a completion; None where all have as many as the limit allows.
        sharing: tokens of a group over its distinct beginnings.
    """

    mean: float | None = None
    sharing: float = 1.0

    def layout(self, run: Arrays, clip: Clip) -> Layout:
        """Return the layout of the prefix trees in score and update."""
        choices = layouts(run.num_samples, run.config.max_completion_tokens, prompt_tokens=clip.tokens)
        if self.mean is None:
            return choices[-1]
        needed = LARGEST_GROUP * run.num_samples * self.mean / self.sharing
        return next((choice for choice in choices if choice[0] * choice[1] >= needed), choices[-1])


LONGEST = Lengths()


def model_config(config: RunConfig, name: str | None = None) -> GraniteSpeechConfig:
    """Return the config of the run's model: of its directory, or of the published model of that name.

    Raises:
        UserError: neither exists.
    """
    options = config.model
    if name is None and Path(options.path).is_dir():
        found = read_config(options.path, adapter=options.lora == "keep")
    else:
        name = name or Path(options.path).name
        if name not in PUBLISHED:
            raise UserError(
                f"there is no model directory {options.path}, and {name!r} is no published model; make the directory, "
                f"or name the size with --model, one of {', '.join(PUBLISHED)}"
            )
        found = PUBLISHED[name]
    if options.lora == "fresh":
        return dataclasses.replace(found, lora=fresh_adapter(options))
    return found if options.lora == "keep" else dataclasses.replace(found, lora=None)


def run_arrays(config: RunConfig, model: GraniteSpeechConfig, mesh: Mesh) -> Arrays:
    """Return the arrays of a run over `mesh`.

    Raises:
        UserError: a dimension that the mesh does not divide, or a pattern of model.trainable that matches nothing.
    """
    model = model.padded(vocab_multiple(mesh))
    graph, definition, params = _model(model, config.model.dtype)
    shardings = param_shardings(graph, mesh)
    loaded = {name: laid_out(leaf, shardings[name]) for name, leaf in params.items()}
    trained = {
        name: laid_out(params[name], shardings[name], jnp.float32)
        for name in select(definition, config.model.trainable)
    }
    updates = config.num_updates() if isinstance(config, GRPOConfig) else config.num_steps
    optimiser = make_optimiser(updates, **vars(config.optimiser))
    return Arrays(
        config=config,
        model=model,
        mesh=mesh,
        definition=definition,
        optimiser=optimiser,
        state=TrainState(params=trained, opt_state=_optimiser_state(optimiser.init, trained, mesh)),
        ref_params={name: loaded[name] for name in trained},
        frozen={name: leaf for name, leaf in loaded.items() if name not in trained},
    )


@functools.lru_cache(maxsize=4)
def _model(model: GraniteSpeechConfig, dtype: str) -> tuple[nnx.State, ModelDef, Shapes]:
    """Return what is the same on every mesh; making it takes a second."""
    graph = abstract_model(model, dtype)
    return nnx.state(graph), *split_model(graph)


def shardings_of(run: Arrays, table: dict[str, str] = TRAINING) -> dict[str, NamedSharding]:
    """Return how every parameter lies by a table of model_port.partition."""
    return param_shardings(_model(run.model, run.config.model.dtype)[0], run.mesh, table)


def laid_out(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """Return a shape with a sharding, in another dtype if one is given."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)


def _optimiser_state(init: Callable, trained: Shapes, mesh: Mesh):
    """Return the optimiser's state as shapes; moments are laid out like their parameters."""

    def lay_out(path, leaf):
        named = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in trained]
        sharding = trained[named[-1]].sharding if named else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(lay_out, jax.eval_shape(init, trained))


def chip_bytes(tree) -> float:
    """Return the bytes that one chip holds of arrays given as shapes; what is there twice counts once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def parameters(run: Arrays, pattern: re.Pattern) -> tuple[int, int]:
    """Return how many parameters match in products, and how many of them are trained."""
    every = {**run.frozen, **run.ref_params}
    sizes = {name: math.prod(leaf.shape) for name, leaf in every.items() if pattern.fullmatch(name)}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name in run.ref_params)


def decoder_flops(
    run: Arrays, clip: Clip, prompts: int, layout: Layout, *, leaves: int = 0, backward: bool = False
) -> float:
    """Return the FLOPs of prompts and their completions, from the projector to the logits.

    Two for each parameter and token; backward, two more for the gradient of what comes in, two for each parameter that
    is trained, and two more where the forward pass is repeated. Attention counts in full, masked or not.

    Args:
        layout: of the prefix trees; of a rollout one tree of T slots for each sample.
        leaves: nodes that are predicted and not fed in.
    """
    decoder, (trees, tokens), text = run.model.decoder, layout, run.config.data.max_prompt_tokens
    own, slots = trees * tokens, clip.tokens - text
    keys = clip.tokens**2 + own * (clip.tokens + tokens)
    attention = 2 * decoder.num_hidden_layers * decoder.num_attention_heads * decoder.head_dim * keys
    head = decoder.vocab_size * decoder.hidden_size
    repeated = run.config.model.remat == "full"
    total = 0.0
    for (size, trained), count, again in (
        (parameters(run, PROJECTOR), slots, False),
        (parameters(run, DECODER), clip.tokens + own, repeated),
        ((attention, 0), 1, repeated),
        ((head, parameters(run, HEAD)[1]), own + leaves, True),
    ):
        total += 2.0 * prompts * count * (size + (size * (1 + again) + trained) * backward)
    return total


def encoder_flops(run: Arrays, clip: Clip, prompts: int) -> float:
    """Return the FLOPs of encoding one clip of every prompt."""
    return 2.0 * prompts * clip.frames * parameters(run, ENCODER)[0]


def score_flops(run: Arrays, clip: Clip, prompts: int, layout: Layout, *, backward: bool = False) -> float:
    """Return the FLOPs of scoring the completions of so many prompts."""
    return decoder_flops(run, clip, prompts, layout, leaves=run.num_samples, backward=backward)


def update_flops(run: Arrays, clip: Clip, prompts: int, layout: Layout) -> float:
    """Return the FLOPs of an update on so many prompts; a trained encoder is run again in it."""
    size, trained = parameters(run, ENCODER)
    repeated = run.config.model.remat == "full"
    encoder = 2.0 * prompts * clip.frames * (size * (2 + repeated) + trained) if trained else 0.0
    return encoder + score_flops(run, clip, prompts, layout, backward=True)
