# SPDX-License-Identifier: Apache-2.0
"""From a config to the parts of a run; the only place that knows all rooms."""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jgrpo.config import ModelOptions, RunConfig
from jgrpo.config.saved import check_same_run, save_config
from jgrpo.data.fit import write_drops
from jgrpo.data.pipeline import PromptData
from jgrpo.data.run import describe, evaluation_data, training_data
from jgrpo.evaluation.evaluate import check_metrics
from jgrpo.paper.tables import paper_row
from jgrpo.programs.encode import ClipEncoder
from jgrpo.programs.layout import choose_weights, decodes_unrolled
from jgrpo.programs.steps import Objective, Programs, TrainState, make_programs
from jgrpo.runtime.checkpoint import RunCheckpoints, saved_steps
from jgrpo.runtime.compilations import Compilations
from jgrpo.runtime.distributed import check_agreement
from jgrpo.runtime.metrics import MetricsWriter
from jgrpo.runtime.optimiser import make_optimiser
from jgrpo.runtime.progress import Progress
from jgrpo.runtime.rows import own_rows
from jgrpo.runtime.stop import StopRequest
from jgrpo.runtime.timer import PhaseTimer
from model_port.config import LoraConfig
from model_port.errors import UserError
from model_port.lora import add_lora
from model_port.params import ModelDef, Params, select, split_model
from model_port.partition import make_mesh, param_shardings, undivided, vocab_multiple
from model_port.paths import as_path
from model_port.processor import Processor
from model_port.weights.config_files import read_config
from model_port.weights.convert import directory_kind, load_model
from model_port.weights.tree import abstract_model

DROPPED = "dropped.jsonl"  # in the run directory


@dataclass
class Policy:
    """A loaded model as arrays on a mesh, and what turns them back into one.

    Attributes:
        rollout_weights, rollout_note: how weights lie while tokens are decoded, and why.
    """

    config: RunConfig
    mesh: Mesh
    processor: Processor
    definition: ModelDef
    trained: Params
    frozen: Params
    rollout_weights: str
    rollout_note: str


@dataclass
class Run:
    """The parts of a training run. `state`, `step` and `best` change as it goes on."""

    config: RunConfig
    policy: Policy
    programs: Programs
    encode: ClipEncoder
    data: PromptData
    validation: PromptData | None
    state: TrainState
    ref_params: Params
    checkpoints: RunCheckpoints
    metrics: MetricsWriter
    progress: Progress
    stop: StopRequest
    compilations: Compilations
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    step: int = 0
    skipped: int = 0
    best: dict[str, Any] | None = None

    @property
    def directory(self) -> epath.Path:
        """The run directory."""
        return as_path(self.config.run_dir)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception) -> None:
        """Close the files; a checkpoint that is being written is finished."""
        with contextlib.ExitStack() as stack:
            for part in (self.stop, self.metrics, self.checkpoints, self.progress, self.compilations):
                stack.callback(part.close)


def check_config(config: RunConfig) -> None:
    """Check what needs no file: the config, the paper's row it names, and that every process has the same.

    Raises:
        UserError: the first that is not so.
    """
    config.validate()
    if config.paper is not None:
        paper_row(config.paper)
    check_agreement(config)


def fresh_adapter(options: ModelOptions) -> LoraConfig:
    """Return the adapter that `lora = "fresh"` asks for."""
    return LoraConfig(rank=options.lora_rank, alpha=options.lora_alpha, target_modules=options.lora_targets)


def check_model(run: RunConfig, processor: Processor, mesh: Mesh) -> None:
    """Check by the model's config alone, before its weights are read, that it fits the mesh and `trainable` its names.

    Raises:
        UserError: no model directory, a dimension that the mesh does not divide, a pattern that matches nothing, an
            encoder that is to be both trained and cached, or a tokenizer whose end token does not end a completion.
    """
    options = run.model
    directory_kind(options.path)
    config = read_config(options.path, adapter=options.lora == "keep").padded(vocab_multiple(mesh))
    if processor.eos_ids[0] not in config.eos_token_ids:
        ends = ", ".join(map(str, config.eos_token_ids))
        raise UserError(
            f"{options.path}: the tokenizer ends a text with token {processor.eos_ids[0]}, and sampling stops at "
            f"{ends} as config.json says; correct eos_token_id in its text_config"
        )
    if options.lora == "fresh":
        config = dataclasses.replace(config, lora=fresh_adapter(options))
    # Only the weights tell whether the head is tied; an untied one has every name that there can be.
    model = abstract_model(dataclasses.replace(config, tie_word_embeddings=False))
    param_shardings(nnx.state(model), mesh)
    trained = select(split_model(model)[0], options.trainable)
    if run.data.cache_encoder and any(name.startswith("encoder.") for name in trained):
        raise UserError("data.cache_encoder is on but model.trainable has the encoder in it; switch one of them off")


def load_policy(config: RunConfig, processor: Processor) -> Policy:
    """Load the model onto the mesh and part it into what is trained and what is not."""
    options = config.model
    mesh = make_mesh(config.mesh)
    fresh = options.lora == "fresh"
    model = load_model(options.path, dtype=options.dtype, lora="merge" if fresh else options.lora, mesh=mesh)
    if fresh:
        add_lora(model, fresh_adapter(options), rngs=nnx.Rngs(config.seed))
    shardings = param_shardings(nnx.state(model), mesh)
    definition, params = split_model(model)
    params = {name: _lay_out(value, shardings[name]) for name, value in params.items()}
    chosen = set(select(definition, options.trainable))
    trained = {name: jax.ShapeDtypeStruct(params[name].shape, jnp.float32) for name in chosen}
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    room = {"memory": memory, "unrolled": decodes_unrolled(mesh, config.rollout_layers)}
    weights, note = choose_weights(config.rollout_weights, {**params, **trained}, definition, mesh, **room)
    if whole := undivided(nnx.state(model), mesh):
        note += (
            f"\nmesh.fsdp {mesh.shape['fsdp']} does not divide {len(whole)} parameters, which are whole on each of its "
            f"devices, {whole[0]} for one; a power of two divides them, and mesh.data splits prompts alone"
        )
    return Policy(
        config=config,
        mesh=mesh,
        processor=processor,
        definition=definition,
        trained={name: value for name, value in params.items() if name in chosen},
        frozen={name: value for name, value in params.items() if name not in chosen},
        rollout_weights=weights,
        rollout_note=note,
    )


def _lay_out(value: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Move a parameter to where it belongs; one that is not there yet is whole in every process."""
    if value.sharding.is_equivalent_to(sharding, value.ndim):
        return value
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.asarray(value)[index])


def policy_programs(policy: Policy, objective: Objective, *, updates: int) -> Programs:
    """Return the programs of a run of so many updates."""
    config = policy.config
    optimiser = config.optimiser
    return make_programs(
        policy.definition,
        mesh=policy.mesh,
        optimiser=make_optimiser(updates, **vars(optimiser)),
        objective=objective,
        trainable=tuple(policy.trained),
        remat=config.model.remat,
        logprob_chunk=config.model.logprob_chunk,
        micro_batches=config.micro_batches,
        rollout_weights=policy.rollout_weights,
        rollout_layers=config.rollout_layers,
        rollout_cache=config.rollout_cache,
    )


def start_run(config: RunConfig, objective: Objective, *, updates: int, references: bool) -> Run:
    """Check everything, load everything, and resume from the run directory's newest checkpoint if it has one.

    Args:
        updates: of the optimiser over the whole run.
        references: whether the data must deliver reference tokens (supervised training).

    Raises:
        UserError: whatever the user can mend, before any work on the device where that is possible.
    """
    check_config(config)
    make_optimiser(updates, **vars(config.optimiser))
    mesh = make_mesh(config.mesh)
    processor = Processor.from_pretrained(config.model.path)
    check_model(config, processor, mesh)
    rows = own_rows(mesh, config.prompts_per_step)
    data = training_data(config, processor, rows=rows, references=references)
    validation = None
    if config.eval.every:
        check_metrics(config)
        rows = own_rows(mesh, config.eval.batch_size)
        validation = evaluation_data(config, config.data.validation, processor, rows=rows)
    directory = as_path(config.run_dir)
    checkpoints = open_run_dir(config, directory)
    policy = load_policy(config, processor)
    programs = policy_programs(policy, objective, updates=updates)
    params = {name: jnp.array(value, jnp.float32, copy=True) for name, value in policy.trained.items()}
    state = programs.init(params)
    step, host = 0, {}
    if checkpoints.latest_step() is not None:
        restored = checkpoints.restore(state)
        state, step, host = restored.arrays, restored.step, restored.host
    encode = ClipEncoder(programs, policy.frozen, policy.mesh)
    if config.data.cache_encoder:
        for part in (data, validation):
            if part is not None:
                encode.keep(state.params, part)
    if jax.process_index() == 0:
        save_config(config, directory / "config.json")
        write_drops([drop for drops in data.drops for drop in drops], directory / DROPPED)
    progress = Progress(config.num_steps, done=step, shown=jax.process_index() == 0)
    for note in (policy.rollout_note, *describe(data, validation, dropped=directory / DROPPED)):
        progress.note(note)
    if step:
        done = "has done all its steps" if step >= config.num_steps else f"goes on after step {step}"
        progress.note(f"{directory} {done}")
    return Run(
        config=config,
        policy=policy,
        programs=programs,
        encode=encode,
        data=data,
        validation=validation,
        state=state,
        ref_params=policy.trained,
        checkpoints=checkpoints,
        metrics=MetricsWriter(directory, step + 1, process_index=jax.process_index()),
        progress=progress,
        stop=StopRequest(),
        compilations=Compilations(),
        step=step,
        skipped=host.get("skipped", 0),
        best=host.get("best"),
    )


def open_run_dir(config: RunConfig, directory: epath.Path) -> RunCheckpoints:
    """Make the run directory, or check that the run which has saved something there is this one.

    Raises:
        UserError: another run's checkpoints, or a directory that cannot be made.
    """
    saved = directory / "config.json"
    if saved.exists() and saved_steps(directory / "checkpoints"):
        check_same_run(config, saved)
    keep, every = config.checkpoint.keep, config.checkpoint.every
    try:
        return RunCheckpoints(directory / "checkpoints", keep=keep, save_every=every)
    except OSError as error:
        raise UserError(f"cannot write to the run directory {directory} ({error}); choose another --run-dir") from error
