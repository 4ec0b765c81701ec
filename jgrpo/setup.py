"""From a config to the parts of a run; the only place that knows all rooms."""

import contextlib
import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jgrpo.config import ModelOptions, RunConfig, check_same_run, save_config
from jgrpo.data.manifest import read_manifest
from jgrpo.data.pipeline import PromptData
from jgrpo.encode import ClipEncoder
from jgrpo.evaluate import Evaluation, Passes, check_metrics, evaluate, write_predictions
from jgrpo.runtime.checkpoint import RunCheckpoints
from jgrpo.runtime.metrics import MetricsWriter
from jgrpo.runtime.optimiser import make_optimiser
from jgrpo.runtime.progress import Progress
from jgrpo.runtime.stop import Stopped, StopRequest
from jgrpo.runtime.timer import PhaseTimer
from jgrpo.steps import Objective, Programs, TrainState, make_programs, sft_objective
from model_port.config import LoraConfig
from model_port.errors import UserError
from model_port.lora import add_lora
from model_port.params import ModelDef, Params, select, split_model
from model_port.partition import make_mesh, param_shardings
from model_port.processor import Processor
from model_port.weights.convert import directory_kind, load_model, save_model
from model_port.weights.side_files import read_config
from model_port.weights.tree import abstract_model


@dataclass
class Policy:
    """A loaded model as arrays on a mesh, and what turns them back into one."""

    config: RunConfig
    mesh: Mesh
    processor: Processor
    definition: ModelDef
    trained: Params
    frozen: Params


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
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    step: int = 0
    skipped: int = 0
    best: dict[str, Any] | None = None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception) -> None:
        """Close the files; a checkpoint that is being written is finished."""
        with contextlib.ExitStack() as stack:
            for part in (self.stop, self.metrics, self.checkpoints, self.progress):
                stack.callback(part.close)


def read_data(config: RunConfig, path: str, processor: Processor, *, rows: int, references: bool) -> PromptData:
    """Return the examples of a manifest, `rows` prompts a batch."""
    data = config.data
    return PromptData(
        read_manifest(path),
        processor,
        prompts_per_step=rows,
        audio_buckets_seconds=data.audio_buckets,
        max_prompt_tokens=data.max_prompt_tokens,
        completion_tokens=config.max_completion_tokens if references else None,
        system=data.system,
        cache=data.cache_features,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


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
    params = {name: jax.device_put(value, shardings[name]) for name, value in params.items()}
    chosen = set(select(definition, options.trainable))
    return Policy(
        config=config,
        mesh=mesh,
        processor=processor,
        definition=definition,
        trained={name: value for name, value in params.items() if name in chosen},
        frozen={name: value for name, value in params.items() if name not in chosen},
    )


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
    make_optimiser(updates, **vars(config.optimiser))
    mesh = make_mesh(config.mesh)
    processor = Processor.from_pretrained(config.model.path)
    check_model(config, processor, mesh)
    data = read_data(config, config.data.train, processor, rows=config.prompts_per_step, references=references)
    validation = None
    if config.eval.every:
        check_metrics(config)
        rows = config.eval.batch_size
        validation = read_data(config, config.data.validation, processor, rows=rows, references=False)
    directory = Path(config.run_dir)
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
    progress = Progress(config.num_steps, done=step)
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
        step=step,
        skipped=host.get("skipped", 0),
        best=host.get("best"),
    )


def open_run_dir(config: RunConfig, directory: Path) -> RunCheckpoints:
    """Make the run directory, or check that the run which has saved something there is this one.

    Raises:
        UserError: another run's checkpoints, or a directory that cannot be made.
    """
    saved = directory / "config.json"
    if saved.exists() and any(entry.name.isdigit() for entry in (directory / "checkpoints").glob("*")):
        check_same_run(config, saved)
    keep, every = config.checkpoint.keep, config.checkpoint.every
    try:
        return RunCheckpoints(directory / "checkpoints", keep=keep, save_every=every)
    except OSError as error:
        raise UserError(f"cannot write to the run directory {directory} ({error}); choose another --run-dir") from error


def finish_step(run: Run, metrics: dict[str, Any], shown: dict[str, float]) -> None:
    """Count the step, evaluate where it is time, write its metrics, save, and stop if that is asked for.

    Raises:
        UserError: more updates than allowed were skipped.
        Stopped: SIGTERM came.
    """
    config = run.config
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
    seconds = run.timer.take()
    metrics |= {f"seconds/{phase}": value for phase, value in seconds.items()}
    run.metrics.write(run.step, metrics)
    run.progress.update(run.step, shown)
    reason = why_stop(run, metrics)
    host = {"skipped": run.skipped, "best": run.best, "data": {"next_index": run.step, "seed": config.seed}}
    run.checkpoints.save(run.step, run.state, host, force=last or reason is not None)
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
    final, aside = run.directory / "policy", run.directory / "policy.new"
    shutil.rmtree(aside, ignore_errors=True)
    save_model(
        policy.definition.bind(policy.frozen, trained),
        aside,
        source_dir=options.path,
        base=Path(options.path).resolve(),
        base_lora=lora,
        only=tuple(trained),
    )
    if jax.process_index() == 0:
        # Two renames: a kill between them leaves no policy/, but a run that goes on writes it again.
        old = run.directory / "policy.old"
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        aside.rename(final)
        shutil.rmtree(old, ignore_errors=True)


def finish_run(run: Run) -> None:
    """Save the last policy, unless the best one on the validation set is there."""
    if run.validation is None:
        save_policy(run)


def evaluate_model(config: RunConfig, manifests: dict[str, str], *, out: Path) -> dict[str, Any]:
    """Evaluate `config.model` on manifests by name; write predictions and results.json under `out`; return those."""
    config.validate()
    check_metrics(config)
    processor = Processor.from_pretrained(config.model.path)
    sets = {
        name: read_data(config, path, processor, rows=config.eval.batch_size, references=False)
        for name, path in manifests.items()
    }
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
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results
