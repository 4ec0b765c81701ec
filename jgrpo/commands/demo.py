# SPDX-License-Identifier: Apache-2.0
"""The demo: a small Granite Speech learns by reinforcement from BLEU, on real audio, on this machine.

convert -> evaluate -> GRPO -> SFT for the same time -> evaluate both -> export, then a table, a picture and a few
completions. The files come from demo/ and configs/ of the checkout that it is started in, or else of the package.
"""

import contextlib
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jgrpo.about import DATA
from jgrpo.commands.evaluate import evaluate_model
from jgrpo.config import RunConfig, load_config, with_model
from jgrpo.data.sources import set_names
from jgrpo.evaluation.tables import completions_text, draw_curves, read_metrics, results_table, step_seconds
from jgrpo.runtime.timer import PhaseTimer
from jgrpo.train_grpo import train_grpo
from jgrpo.train_sft import train_sft
from model_port.errors import UserError
from model_port.libraries import keep_compiled
from model_port.paths import is_remote
from model_port.weights.convert import convert, export

NEEDED = ("demo/base", "demo/train.jsonl", "configs/demo_grpo.py", "configs/demo_sft.py")
VOICES = "test_voices"  # the manifest of held-out voices; the other one has held-out sentences in known voices
TIMING_STEPS = 8  # of the short run that measures how long a step of SFT takes
EVALUATIONS = 10  # on the validation set, per training


@dataclass(frozen=True)
class DemoOptions:
    """Train the small model of demo/ by SFT and GRPO and compare them."""

    run_dir: str = "runs/demo"
    """Where everything is written; an earlier demo there is replaced."""
    seed: Annotated[int, tyro.conf.arg(help="Of both trainings.")] = 0


def run_demo(arguments: list[str]) -> None:
    """Run the demo."""
    options = tyro.cli(DemoOptions, args=arguments, prog="jgrpo demo")
    if is_remote(options.run_dir):
        raise UserError(f"--run-dir is {options.run_dir}; the demo writes to a disk, give a directory")
    keep_compiled()
    demo(Path(options.run_dir), seed=options.seed)


def demo(run_dir: Path, *, seed: int = 0) -> dict[str, Any]:
    """Run everything under `run_dir` and return the summary that is also written there; an earlier demo is replaced.

    Raises:
        UserError: a package without the files, or `run_dir` holds something else than a demo.
    """
    roots = [root for root in (Path.cwd(), DATA) if all((root / path).exists() for path in NEEDED)]
    if not roots:
        raise UserError(f"the demo needs {', '.join(NEEDED)}: start it in the root of a checkout, or install the wheel")
    run_dir = run_dir if roots[0] == Path.cwd() else run_dir.absolute()
    with contextlib.chdir(roots[0]):
        return _demo(run_dir, seed)


def _demo(run_dir: Path, seed: int) -> dict[str, Any]:
    timer, base, results = PhaseTimer(), run_dir / "base", {}
    if run_dir.exists():
        if any(run_dir.iterdir()) and not (base / "model_port.json").exists():
            raise UserError(f"{run_dir} holds something else than an earlier demo; choose another --run-dir")
        shutil.rmtree(run_dir)
    grpo = prepare("configs/demo_grpo.py", base, run_dir / "grpo", seed)
    sft = prepare("configs/demo_sft.py", base, run_dir / "sft", seed)
    with timer("convert"):
        say("1/6", "convert demo/base from Hugging Face to Orbax")
        convert("demo/base", base)
    with timer("evaluate"):
        say("2/6", "evaluate the base: sampled at temperature 0.9 and top-p 0.9 with 5 seeds, and greedy")
        results["base"] = evaluate(grpo, base, run_dir)
    with timer("grpo"):
        say("3/6", f"GRPO: {grpo.num_steps} steps of {grpo.prompts_per_step} prompts x {grpo.grpo.num_samples} samples")
        train_grpo(grpo)
    with timer("sft"):
        sft = for_seconds(sft, training_seconds(run_dir / "grpo"))
        say("4/6", f"SFT for as long: {sft.num_steps} steps of {sft.prompts_per_step} references")
        train_sft(sft)
    with timer("evaluate"):
        say("5/6", "evaluate both, each at its best step on the validation set")
        for name, config in (("sft", sft), ("grpo", grpo)):
            results[name] = evaluate(config, run_dir / name / "policy", run_dir)
            results[name]["seconds"] = training_seconds(run_dir / name)
    with timer("export"):
        say("6/6", "export the GRPO policy back to Hugging Face format")
        export(run_dir / "grpo" / "policy", run_dir / "grpo_hf")
    phases = timer.take()
    summary = {**results, "seed": seed, "seconds": {**phases, "total": sum(phases.values())}}
    write_results(run_dir, summary)
    return summary


def prepare(path: str, base: Path, run_dir: Path, seed: int) -> RunConfig:
    """Return a demo config that starts from `base`, with ten looks at the validation set."""
    config = load_config(path)
    return spread_evaluations(
        dataclasses.replace(
            config, run_dir=str(run_dir), seed=seed, model=dataclasses.replace(config.model, path=str(base))
        )
    )


def spread_evaluations(config: RunConfig) -> RunConfig:
    """Return the config with the validation passes spread over its steps."""
    every = max(config.num_steps // EVALUATIONS, 1)
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=every))


def for_seconds(config: RunConfig, seconds: float) -> RunConfig:
    """Return the config with as many steps as fit into `seconds` of training, measured by a short run."""
    probe = Path(config.run_dir).with_name("sft_timing")
    no_eval = dataclasses.replace(config.eval, every=0)
    train_sft(dataclasses.replace(config, run_dir=str(probe), num_steps=TIMING_STEPS, eval=no_eval))
    steps = max(round(seconds * TIMING_STEPS / training_seconds(probe)), EVALUATIONS)
    shutil.rmtree(probe)
    return spread_evaluations(dataclasses.replace(config, num_steps=steps))


def training_seconds(run_dir: Path) -> float:
    """Return a run's seconds in its steps, evaluation and compilation left out."""
    return float(step_seconds(read_metrics(run_dir)).sum())


def evaluate(config: RunConfig, model: Path, run_dir: Path) -> dict[str, Any]:
    """Return the results on both test manifests; predictions go to eval/ of the demo."""
    sets = set_names(config.data.test)
    name = model.parent.name if model.name == "policy" else model.name
    results = evaluate_model(with_model(config, model), sets, out=run_dir / "eval" / name)
    voices = results.pop(VOICES)
    (test,) = results.values()
    return {
        **test,
        "seconds": 0.0,
        "evaluation_seconds": test["seconds"] + voices["seconds"],
        "held_out_voices": voices,
    }


def write_results(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, table.md, completions.md and curves.png, and print what a person wants to see."""
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    names = ("base", "sft", "grpo")
    table = results_table({name: summary[name] for name in names})
    predictions = {name: run_dir / "eval" / name / "test.jsonl" for name in names}
    completions = completions_text(predictions, count=6)
    (run_dir / "table.md").write_text(table)
    (run_dir / "completions.md").write_text(completions)
    draw_curves({"GRPO": run_dir / "grpo", "SFT": run_dir / "sft"}, run_dir / "curves.png")
    print(f"\n{table}\n{completions}")
    seconds = summary["seconds"]
    print("seconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items()))
    print(f"{run_dir}/: summary.json, table.md, completions.md, curves.png, grpo_hf/ (the trained model)")


def say(step: str, text: str) -> None:
    """Tell the person what begins."""
    print(f"\n[{step}] {text}", flush=True)
