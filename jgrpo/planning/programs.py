# SPDX-License-Identifier: Apache-2.0
"""Every program of a run with the shapes that it is called with; no array is made.

What a step calls, and with what, is written down in `_training_calls` and `_validation_calls` alone.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jgrpo.core.tree import Layout
from jgrpo.planning.arrays import (
    LONGEST,
    Arrays,
    Clip,
    Lengths,
    Shapes,
    chip_bytes,
    decoder_flops,
    encoder_flops,
    laid_out,
    score_flops,
    shardings_of,
    update_flops,
)
from jgrpo.programs.layout import choose_weights, decodes_unrolled, rollout_dtype
from jgrpo.programs.steps import Programs, Targets, grpo_objective, make_programs, sft_objective, truncation
from model_port.batch import Batch, Trees
from model_port.generate import cache_sizes
from model_port.partition import ROLLOUT, batch_sharding

GREEDY = {"temperature": 0.0}


@dataclass(frozen=True)
class AbstractRun(Arrays):
    """The arrays of a run with its programs.

    Attributes:
        weights: how they lie in the rollout, gathered or stationary, and why.
        decoding: trained and frozen parameters as the rollout takes them.
    """

    programs: Programs
    weights: tuple[str, str]
    decoding: tuple[Shapes, Shapes]


@dataclass(frozen=True)
class Call:
    """A program as a run calls it.

    Attributes:
        program: jitted; to be lowered with the mesh set.
        arguments: shapes with shardings.
        times: calls in a training step; 0 for what only an evaluation runs.
        flops: of its matrix products over all chips, by the numbers of parameters and tokens.
        trips: of each loop whose end the data decides, at most.
        at_a_time: share of its temporaries that exist at one time, where it stands for several programs in turn.
    """

    name: str
    program: Any
    arguments: tuple
    options: dict[str, Any] = field(default_factory=dict)
    times: int = 1
    flops: float = 0.0
    trips: int | None = None
    at_a_time: float = 1.0


def abstract_run(arrays: Arrays, *, memory: float) -> AbstractRun:
    """Return the run with its programs; `memory` is the HBM of a chip in bytes."""
    config, trained, frozen = arrays.config, arrays.state.params, arrays.frozen
    weights = choose_weights(
        config.rollout_weights,
        {**frozen, **trained},
        arrays.definition,
        arrays.mesh,
        memory=int(memory),
        unrolled=decodes_unrolled(arrays.mesh, config.rollout_layers),
    )
    shardings, dtype = shardings_of(arrays, ROLLOUT[weights[0]]), jnp.dtype(config.model.dtype)

    def for_decoding(name, leaf):
        wanted = laid_out(leaf, shardings[name], rollout_dtype(name, leaf.dtype, dtype))
        return leaf if name.startswith("encoder.") or wanted == leaf else wanted

    objective = grpo_objective(config.grpo, config.max_completion_tokens) if arrays.is_grpo else sft_objective()
    programs = make_programs(
        arrays.definition,
        mesh=arrays.mesh,
        optimiser=arrays.optimiser,
        objective=objective,
        trainable=tuple(trained),
        remat=config.model.remat,
        logprob_chunk=config.model.logprob_chunk,
        micro_batches=config.micro_batches,
        rollout_weights=weights[0],
        rollout_layers=config.rollout_layers,
        rollout_cache=config.rollout_cache,
    )
    decoding = tuple({name: for_decoding(name, leaf) for name, leaf in part.items()} for part in (trained, frozen))
    fields = {entry.name: getattr(arrays, entry.name) for entry in dataclasses.fields(Arrays)}
    return AbstractRun(**fields, programs=programs, weights=weights, decoding=decoding)


def calls(run: AbstractRun, clip: Clip, lengths: Lengths | Layout = LONGEST) -> list[Call]:
    """Return the calls of a training step and of its validation, for prompts with a clip of this bucket.

    What learns from completions is there for the layout of prefix trees that is expected, and, called in no step, for
    the largest, whose memory a run must have.

    Args:
        lengths: of the completions, or the layout that they have.
    """
    found = _training_calls(run, clip, lengths.layout(run, clip) if isinstance(lengths, Lengths) else lengths)
    return found + (_validation_calls(run, clip) if run.config.eval.every else [])


def _training_calls(run: AbstractRun, clip: Clip, expected: Layout) -> list[Call]:
    """What jgrpo.train_grpo and jgrpo.train_sft call in a step, in their order."""
    config, programs = run.config, run.programs
    prompts, limit, samples = config.prompts_per_step, config.max_completion_tokens, run.num_samples
    largest = LONGEST.layout(run, clip)
    sizes = [(expected, ""), *([(largest, ", largest")] if largest != expected else [])]
    found = [_encode(run, clip, "encode", prompts)]
    grpo = config.grpo if run.is_grpo else None
    if grpo:
        options = {"num_tokens": limit, "temperature": grpo.temperature, **truncation(grpo)}
        rows, sampled = prompts // grpo.rollout_chunks, samples - grpo.mixed_policy
        found += _layout(run)
        found.append(_rollout(run, clip, "rollout", rows, sampled, options, times=grpo.rollout_chunks))
        if grpo.beta > 0:
            arrays, program = (run.ref_params, run.frozen, *_inputs(run, clip, prompts)), programs.score.__wrapped__
            for layout, name in sizes:
                inputs, flops = (*arrays, _trees(run, prompts, layout)), score_flops(run, clip, prompts, layout)
                found.append(Call(f"score{name}", program, inputs, times=layout == expected, flops=flops))
    minibatches, passes = (grpo.num_minibatches, grpo.num_iterations) if grpo else (1, 1)
    rows, program = prompts // minibatches, programs.update.__wrapped__
    for layout, name in sizes:
        inputs = (run.state, run.frozen, *_inputs(run, clip, rows), _targets(run, rows, layout))
        times = minibatches * passes * (layout == expected)
        found.append(Call(f"update{name}", program, inputs, times=times, flops=update_flops(run, clip, rows, layout)))
    return found[1:] if config.data.cache_encoder else found


def _validation_calls(run: AbstractRun, clip: Clip) -> list[Call]:
    """What jgrpo.evaluation.evaluate calls for a batch while a run trains."""
    config, options = run.config, run.config.eval
    sampled = {"temperature": options.temperature, "top_p": options.top_p} if options.validation_seeds else GREEDY
    settings = {"num_tokens": config.max_completion_tokens, **sampled}
    seeds = max(len(options.validation_seeds), 1)
    found = [
        _encode(run, clip, "validation encode", options.batch_size, times=0),
        _rollout(run, clip, "validation rollout", options.batch_size, seeds, settings, times=0),
    ]
    return found[1:] if config.data.cache_encoder else found


def _encode(run: AbstractRun, clip: Clip, name: str, prompts: int, *, times: int = 1) -> Call:
    inputs = (run.state.params, run.frozen, _inputs(run, clip, prompts)[0])
    flops = encoder_flops(run, clip, prompts)
    return Call(name, run.programs.encode.__wrapped__, inputs, times=times, flops=flops)


def _layout(run: AbstractRun) -> list[Call]:
    """What jgrpo.programs.layout moves once per rollout, one by one: the parameters that lie otherwise for decoding."""
    before, after = {**run.state.params, **run.frozen}, {**run.decoding[0], **run.decoding[1]}
    moved = {name: leaf for name, leaf in after.items() if leaf is not before[name]}
    if not moved:
        return []
    program = jax.jit(
        lambda params: {name: value.astype(moved[name].dtype) for name, value in params.items()},
        out_shardings={name: leaf.sharding for name, leaf in moved.items()},
    )
    sizes = [chip_bytes(leaf) for leaf in moved.values()]
    return [Call("layout", program, ({name: before[name] for name in moved},), at_a_time=max(sizes) / sum(sizes))]


def _rollout(run, clip: Clip, name: str, prompts: int, samples: int, options: dict[str, Any], *, times: int) -> Call:
    keys = _rows(run, (prompts, samples), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    inputs = (*run.decoding, *_inputs(run, clip, prompts), keys)
    unrolled = decodes_unrolled(run.mesh, run.config.rollout_layers)
    # Each stage of the cache is a loop; which of them has how many of the tokens the data decides.
    stages = len(cache_sizes(options["num_tokens"], unrolled=unrolled))
    flops = decoder_flops(run, clip, prompts, (samples, options["num_tokens"]))
    trips = -(-(options["num_tokens"] - 1) // stages)
    return Call(name, run.programs.rollout.__wrapped__, inputs, options, times, flops, trips)


def _rows(run: AbstractRun, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """Return an array whose first axis is prompts."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(run.mesh))


def _inputs(run: AbstractRun, clip: Clip, prompts: int) -> tuple[Batch, jax.ShapeDtypeStruct]:
    """Return a batch and its encoder output."""
    encoder, fields = run.model.encoder, {}
    for name, shape, dtype in (
        ("tokens", (prompts, clip.tokens), jnp.int32),
        ("mask", (prompts, clip.tokens), bool),
        ("audio_slots", (prompts, clip.tokens), jnp.int32),
        ("features", (prompts, 1, clip.frames, encoder.input_dim), jnp.float32),
        ("lengths", (prompts, 1), jnp.int32),
    ):
        fields[name] = _rows(run, shape, dtype)
    encoded = _rows(run, (prompts, 1, clip.frames, encoder.embedding_dim), run.config.model.dtype)
    return _struct(Batch, fields), encoded


def _trees(run: AbstractRun, prompts: int, layout: Layout) -> Trees:
    """Return the completions of so many prompts as prefix trees."""
    samples, limit, (trees, slots) = run.num_samples, run.config.max_completion_tokens, layout
    nodes, forest = (prompts, trees * slots + samples), (prompts, trees, slots)
    shapes = {"tokens": nodes, "parents": nodes, "depths": forest, "ends": forest, "node_of": (prompts, samples, limit)}
    return _struct(Trees, {name: _rows(run, shape, jnp.int32) for name, shape in shapes.items()})


def _targets(run: AbstractRun, prompts: int, layout: Layout) -> Targets:
    """Return completions of so many prompts to learn from."""
    grpo = run.config.grpo if run.is_grpo else None
    groups = prompts, run.num_samples
    number = _rows(run, (*groups, run.config.max_completion_tokens))
    fields = {
        "trees": _trees(run, prompts, layout),
        "mask": _rows(run, number.shape, bool),
        "old_logp": number,
        "ref_logp": number if grpo and grpo.beta > 0 else None,
        "advantage": _rows(run, groups),
        "is_off_policy": _rows(run, groups, bool) if grpo and grpo.mixed_policy else None,
    }
    return _struct(Targets, fields)


def _struct(cls: type, fields: dict[str, Any]):
    """Return a batch.struct of shapes, past its constructor, which checks arrays."""
    found = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(found, name, value)
    return found
