"""From a config to the parts of a run; the only place that knows all rooms."""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jgrpo.config import ModelOptions, RunConfig
from jgrpo.data.fit import write_drops
from jgrpo.data.pipeline import PromptData
from jgrpo.data.run import describe, evaluation_data, training_data
from jgrpo.encode import ClipEncoder
from jgrpo.evaluate import Evaluation, Passes, check_metrics, evaluate, write_predictions
from jgrpo.layout import choose_weights, decodes_unrolled
from jgrpo.runtime.checkpoint import RunCheckpoints, saved_steps
from jgrpo.runtime.compilations import Compilations
from jgrpo.runtime.distributed import check_agreement
from jgrpo.runtime.metrics import MetricsWriter
from jgrpo.runtime.optimiser import make_optimiser
from jgrpo.runtime.progress import Progress
from jgrpo.runtime.replace import replaced
from jgrpo.runtime.rows import own_rows, sum_over_rows
from jgrpo.runtime.stop import Stopped, StopRequest
from jgrpo.runtime.timer import PhaseTimer
from jgrpo.saved_config import check_same_run, save_config
from jgrpo.steps import Objective, Programs, TrainState, make_programs, sft_objective
from model_port.config import LoraConfig
from model_port.errors import UserError
from model_port.lora import add_lora
from model_port.params import ModelDef, Params, select, split_model
from model_port.partition import make_mesh, param_shardings
from model_port.paths import as_path, resolved, write_whole
from model_port.processor import Processor
from model_port.weights.convert import directory_kind, load_model, save_model
from model_port.weights.orbax_files import MANIFEST
from model_port.weights.side_files import read_config
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
    reference: Params
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
    config = read_config(options.path, adapter=options.lora == "keep")
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
    config.validate()
    check_agreement(config)
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
        reference=policy.trained,
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


def finish_step(run: Run, metrics: dict[str, Any], shown: dict[str, float]) -> None:
    """Count the step, evaluate where it is time, write its metrics, save, and stop if that is asked for.

    A checkpoint is written while the next step is computed, and before that step counts it is complete: a run that is
    killed at any moment, in a save too, loses at most `checkpoint.every` finished steps and the one in progress.

    Raises:
        UserError: more updates than allowed were skipped.
        Stopped: SIGTERM came.
    """
    config = run.config
    with run.timer("checkpoint"):
        run.checkpoints.wait()
    run.step += 1
    if metrics["skipped"]:
        run.skipped += round(metrics["skipped"])
        run.progress.note(
            f"step {run.step}: loss {metrics['loss']}, grad_norm {metrics['grad_norm']}: not finite, so the update was "
            f"skipped ({run.skipped} so far)"
        )
    last = run.step == config.num_steps
    if run.validation is not None and (run.step % config.eval.every == 0 or last):
        with run.timer("evaluate"):
            found = validate(run)
        metrics |= {f"eval/{name}": value for name, value in found.items()}
        run.progress.note(f"step {run.step}: validation " + ", ".join(f"{name} {found[name]:.2f}" for name in found))
    skipped = run.data.take_skipped()
    for message in skipped:
        run.progress.note(f"step {run.step}: {message}")
    metrics["data/skipped_clips"] = sum_over_rows(len(skipped), run.policy.mesh)
    metrics |= {f"seconds/{phase}": value for phase, value in run.timer.take().items()}
    metrics["compilations"] = run.compilations.count
    run.metrics.write(run.step, metrics)
    run.progress.update(run.step, shown)
    reason = why_stop(run, metrics)
    force = last or reason is not None
    host = {"skipped": run.skipped, "best": run.best, "data": {"next_index": run.step, "seed": config.seed}}
    with run.timer("checkpoint"):
        if run.checkpoints.is_due(run.step, force=force):
            run.metrics.flush()  # first: a run that goes on from a checkpoint goes on from metrics that reach up to it
        run.checkpoints.save(run.step, run.state, host, force=force)
    if reason is not None:
        raise reason


def why_stop(run: Run, metrics: dict[str, Any]) -> Exception | None:
    """Return what ends the run before its last step, if anything does."""
    config = run.config
    if metrics["skipped"] and run.skipped > config.max_skipped_updates:
        return UserError(
            f"step {run.step}: loss {metrics['loss']}, grad_norm {metrics['grad_norm']}; {run.skipped} updates were "
            f"skipped for a non-finite loss or gradient and max_skipped_updates is {config.max_skipped_updates}; "
            "start again in another --run-dir with a lower --optimiser.learning-rate"
        )
    if run.stop.asked() and run.step < config.num_steps:
        return Stopped(f"stopped after step {run.step}, which is saved; the same command goes on from there")
    return None


def validate(run: Run) -> dict[str, float]:
    """Evaluate on the validation set and keep the policy if it is the best so far; return every metric's mean.

    The first metric decides. Where a run goes on with another one, the search for its best policy starts anew.
    """
    result = evaluate_policy(run, run.validation, Passes.validation(run.config.eval))
    means = {name: result.mean(name) for name in run.config.eval.metrics}
    metric, value = next(iter(means.items()))
    best = run.best if run.best is not None and run.best.get("metric") == metric else None
    if best is None or (value < best["value"] if result.lower_is_better(metric) else value > best["value"]):
        run.best = {"step": run.step, "metric": metric, "value": value}
        save_policy(run)
    return means


def evaluate_policy(run: Run, data: PromptData, passes: Passes) -> Evaluation:
    """Evaluate the policy in training."""
    policy, arrays = run.policy, (run.state.params, run.policy.frozen)
    settings = {"mesh": policy.mesh, "config": run.config, "passes": passes}
    return evaluate(run.programs, run.encode, *arrays, data, policy.processor, **settings)


def save_policy(run: Run) -> None:
    """Write the trained parameters as a model directory, `policy/`, that names its base."""
    policy, options = run.policy, run.config.model
    trained = {name: value.astype(policy.trained[name].dtype) for name, value in run.state.params.items()}
    lora = "merge" if options.lora == "fresh" else options.lora
    # A run that is killed in the middle may have no policy/, but writes it again when it goes on.
    with replaced(run.directory / "policy", mark=MANIFEST) as directory:
        save_model(
            policy.definition.bind(policy.frozen, trained),
            directory,
            source_dir=options.path,
            base=resolved(options.path),
            base_lora=lora,
            only=tuple(trained),
        )


def finish_run(run: Run) -> None:
    """Save the last policy, unless the best one on the validation set is there."""
    if run.validation is None:
        save_policy(run)


def evaluate_model(config: RunConfig, paths: dict[str, str], *, out: str | os.PathLike) -> dict[str, Any]:
    """Evaluate `config.model` on data sets by name; write predictions and results.json under `out`; return those."""
    out = as_path(out)
    config.validate()
    check_agreement(config)
    check_metrics(config)
    processor = Processor.from_pretrained(config.model.path)
    rows = own_rows(make_mesh(config.mesh), config.eval.batch_size)
    sets = {name: evaluation_data(config, path, processor, rows=rows) for name, path in paths.items()}
    policy = load_policy(config, processor)
    programs = policy_programs(policy, sft_objective(), updates=1)
    encode = ClipEncoder(programs, policy.frozen, policy.mesh)
    arrays = (policy.trained, policy.frozen)
    settings = {"mesh": policy.mesh, "config": config, "passes": Passes.final(config.eval)}
    results = {}
    for name, data in sets.items():
        result = evaluate(programs, encode, *arrays, data, processor, **settings)
        write_predictions(result, out / f"{name}.jsonl")
        results[name] = result.summary()
    if jax.process_index() == 0:
        write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
    return results
