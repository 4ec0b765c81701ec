"""From a config to the parts of a run; the only place that knows all rooms."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jgrpo.config import RunConfig, save_config
from jgrpo.data.manifest import read_manifest
from jgrpo.data.pipeline import PromptData
from jgrpo.evaluate import Evaluation, evaluate, write_predictions
from jgrpo.runtime.checkpoint import RunCheckpoints
from jgrpo.runtime.metrics import MetricsWriter
from jgrpo.runtime.optimiser import make_optimiser
from jgrpo.runtime.progress import Progress
from jgrpo.runtime.timer import PhaseTimer
from jgrpo.steps import Objective, Programs, TrainState, make_programs, sft_objective
from model_port.config import LoraConfig
from model_port.errors import UserError
from model_port.lora import add_lora
from model_port.params import ModelDef, Params, select, split_model
from model_port.partition import make_mesh, param_shardings
from model_port.processor import Processor
from model_port.weights.convert import load_model, save_model


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
    data: PromptData
    validation: PromptData | None
    state: TrainState
    reference: Params
    checkpoints: RunCheckpoints
    metrics: MetricsWriter
    progress: Progress
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    step: int = 0
    skipped: int = 0
    best: dict[str, Any] | None = None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)


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
        cache=data.cache_features,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def load_policy(config: RunConfig, processor: Processor) -> Policy:
    """Load the model onto the mesh and part it into what is trained and what is not."""
    options = config.model
    mesh = make_mesh(config.mesh)
    fresh = options.lora == "fresh"
    model = load_model(options.path, dtype=options.dtype, lora="merge" if fresh else options.lora, mesh=mesh)
    if fresh:
        adapter = LoraConfig(rank=options.lora_rank, alpha=options.lora_alpha, target_modules=options.lora_targets)
        add_lora(model, adapter, rngs=nnx.Rngs(config.seed))
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
    make_mesh(config.mesh)
    processor = Processor.from_pretrained(config.model.path)
    data = read_data(config, config.data.train, processor, rows=config.prompts_per_step, references=references)
    validation = None
    if config.eval.every:
        rows = config.eval.batch_size
        validation = read_data(config, config.data.validation, processor, rows=rows, references=False)
    directory = Path(config.run_dir)
    save_config(config, directory / "config.json")
    policy = load_policy(config, processor)
    programs = policy_programs(policy, objective, updates=updates)
    params = {name: jnp.array(value, jnp.float32, copy=True) for name, value in policy.trained.items()}
    state = programs.init(params)
    checkpoints = RunCheckpoints(
        directory / "checkpoints", keep=config.checkpoint.keep, save_every=config.checkpoint.every
    )
    step, host = 0, {}
    if checkpoints.latest_step() is not None:
        restored = checkpoints.restore(state)
        state, step, host = restored.arrays, restored.step, restored.host
    progress = Progress(config.num_steps, done=step)
    if step:
        progress.note(f"resuming {directory} after step {step}")
    return Run(
        config=config,
        policy=policy,
        programs=programs,
        data=data,
        validation=validation,
        state=state,
        reference=policy.trained,
        checkpoints=checkpoints,
        metrics=MetricsWriter(directory, step + 1, process_index=jax.process_index()),
        progress=progress,
        step=step,
        skipped=host.get("skipped", 0),
        best=host.get("best"),
    )


def finish_step(run: Run, metrics: dict[str, Any], shown: dict[str, float]) -> None:
    """Count the step, write its metrics, evaluate and save where it is time."""
    config = run.config
    run.step += 1
    if metrics["skipped"]:
        run.skipped += 1
        run.progress.note(
            f"step {run.step}: loss or gradient is not finite; the update was skipped ({run.skipped} so far)"
        )
        if run.skipped > config.max_skipped_updates:
            raise UserError(
                f"step {run.step}: loss {metrics['loss']}, grad_norm {metrics['grad_norm']}; {run.skipped} updates "
                "were skipped for a non-finite loss or gradient, more than max_skipped_updates; lower the learning rate"
            )
    last = run.step == config.num_steps
    if run.validation is not None and (run.step % config.eval.every == 0 or last):
        with run.timer("evaluate"):
            metrics["eval/bleu"] = validate(run)
        run.progress.note(f"step {run.step}: validation BLEU {metrics['eval/bleu']:.2f}")
    seconds = run.timer.take()
    metrics |= {f"seconds/{phase}": value for phase, value in seconds.items()}
    run.metrics.write(run.step, metrics)
    run.progress.update(run.step, shown)
    host = {"skipped": run.skipped, "best": run.best, "data": {"next_index": run.step, "seed": config.seed}}
    run.checkpoints.save(run.step, run.state, host, force=last)


def validate(run: Run) -> float:
    """Evaluate on the validation set and keep the policy if it is the best so far; return the mean BLEU."""
    result = evaluate_policy(run, run.validation, seeds=run.config.eval.validation_seeds, greedy=False)
    if run.best is None or result.mean > run.best["bleu"]:
        run.best = {"step": run.step, "bleu": result.mean}
        save_policy(run)
    return result.mean


def evaluate_policy(run: Run, data: PromptData, *, seeds: tuple[int, ...], greedy: bool) -> Evaluation:
    """Evaluate the policy in training."""
    policy, config = run.policy, run.config
    return evaluate(
        run.programs,
        run.state.params,
        policy.frozen,
        data,
        policy.processor,
        mesh=policy.mesh,
        options=config.eval,
        num_tokens=config.max_completion_tokens,
        seeds=seeds or (0,),
        greedy=greedy,
    )


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
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)


def finish_run(run: Run) -> None:
    """Save what is left to save and close the files."""
    if run.validation is None:
        save_policy(run)
    run.checkpoints.close()
    run.metrics.close()
    run.progress.close()


def evaluate_model(config: RunConfig, manifests: dict[str, str], *, out: Path) -> dict[str, Any]:
    """Evaluate `config.model` on manifests by name; write predictions and results.json under `out`; return those."""
    config.validate()
    processor = Processor.from_pretrained(config.model.path)
    sets = {
        name: read_data(config, path, processor, rows=config.eval.batch_size, references=False)
        for name, path in manifests.items()
    }
    policy = load_policy(config, processor)
    programs = policy_programs(policy, sft_objective(), updates=1)
    results = {}
    for name, data in sets.items():
        result = evaluate(
            programs,
            policy.trained,
            policy.frozen,
            data,
            processor,
            mesh=policy.mesh,
            options=config.eval,
            num_tokens=config.max_completion_tokens,
            seeds=config.eval.seeds,
            greedy=config.eval.greedy,
        )
        write_predictions(result, out / f"{name}.jsonl")
        results[name] = result.summary()
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results
