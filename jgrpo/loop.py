# SPDX-License-Identifier: Apache-2.0
"""What the end of a step does: count, evaluate, write, save, and stop where that is asked for."""

from typing import Any

from jgrpo.data.pipeline import PromptData
from jgrpo.evaluation.evaluate import Evaluation, Passes, evaluate
from jgrpo.runtime.replace import replaced
from jgrpo.runtime.rows import sum_over_rows
from jgrpo.runtime.stop import Stopped
from jgrpo.setup import Run
from model_port.errors import UserError
from model_port.paths import resolved
from model_port.weights.convert import save_model
from model_port.weights.orbax_files import MANIFEST


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
    host = {"skipped": run.skipped, "best": run.best}
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
