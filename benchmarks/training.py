"""Whole GRPO runs on a workload's weights, as the command line makes them, and the seconds of their steps."""

import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.workload import Size, Workload, length_limits, reshaped, run_config, word
from jgrpo.config import CheckpointOptions, DataOptions, GRPOConfig
from jgrpo.rollout.groups import GroupSampler
from jgrpo.train_grpo import train_grpo
from model_port.features import SAMPLE_RATE

WARM_UP = 2  # steps: the first compiles, the second still fills queues
PHASES = ("data", "encode", "rollout", "reward", "score", "reward_wait", "update")


class Training:
    """A directory with a model and clips to train on, and runs on them."""

    def __init__(self, size: Size, folder: Path, *, lengths: tuple[float, ...] = ()):
        """Write the model, and clips for a few steps, of `lengths` seconds in turn, by default those of the size."""
        self.size, self.folder, self.lengths = size, folder, lengths or (size.seconds,)
        self._count = 0
        workload = Workload(size)
        workload.export(folder / "model")
        random = np.random.default_rng(3)
        vocabulary = workload.run.model.decoder.vocab_size
        rows = []
        for index, text in enumerate(workload.texts * len(self.lengths)):
            seconds = self.lengths[index // len(workload.texts)]
            noise = 0.1 * random.standard_normal(round(SAMPLE_RATE * seconds))
            soundfile.write(folder / f"{index}.wav", noise, SAMPLE_RATE)
            reference = " ".join(word(k) for k in random.integers(1, vocabulary - 16, size.new_tokens))
            rows.append({"audio": f"{index}.wav", "prompt": text, "reference": reference})
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, steps: int, *, data: dict[str, Any] | None = None, **options: Any) -> GRPOConfig:
        """Return a run of so many steps in a directory of its own."""
        self._count += 1
        shared = {"max_prompt_tokens": self.size.text_tokens, "audio_buckets": self.lengths}
        return run_config(
            self.size,
            run_dir=str(self.folder / f"run{self._count}"),
            data=DataOptions(train=str(self.folder / "train.jsonl"), **{**shared, **(data or {})}),
            num_steps=steps,
            checkpoint=CheckpointOptions(every=steps),
            completions_every=0,
            model={"path": str(self.folder / "model"), **options.pop("model", {})},
            **options,
        )

    def steps(self, count: int, **options: Any) -> list[dict[str, float]]:
        """Train for so many steps after the warm-up; return their metrics, `seconds/PHASE` among them."""
        config = self.config(count + WARM_UP, **options)
        train_grpo(config, sampler=_sampler(self.size))
        lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines][WARM_UP:]


def _sampler(size: Size) -> type[GroupSampler]:
    """Return what samples completions of the lengths of a size; without rollout chunks where these differ."""
    if size.mean_length is None:
        return GroupSampler

    class Reshaping(GroupSampler):
        def __init__(self, run, pool, config):
            super().__init__(run, pool, config)
            self._sampling |= length_limits(size, run.policy.mesh)

        def _start(self, batch, encoded, round):
            (out,) = super()._start(batch, encoded, round)
            return [reshaped(out, size, self._run.policy.processor.pad_id)]

    return Reshaping


@contextmanager
def training(size: Size, **options: Any) -> Iterator[Training]:
    """Yield a Training in a directory that is removed; its runs share compiled programs, so that they start fast.

    Where JAX has a cache of compiled programs already, they share that one.
    """
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    with tempfile.TemporaryDirectory() as folder:
        try:
            if before[0] is None:
                _cache_in(f"{folder}/compiled", 0.1)
            yield Training(size, Path(folder), **options)
        finally:
            if before[0] is None:
                _cache_in(*before)


def _cache_in(directory: str | None, least_seconds: float) -> None:
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    compilation_cache.reset_cache()


def in_turns(
    work: Training, cases: dict[str, dict[str, Any]], *, rounds: int, steps: int
) -> dict[str, list[dict[str, float]]]:
    """Return the steps' metrics of runs with these options, `rounds` runs each, in turns."""
    found = {name: [] for name in cases}
    for _ in range(rounds):
        for name, options in cases.items():
            found[name] += work.steps(steps, **options)
    return found


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the median seconds of a step, of each of its phases, and of what is left over."""
    parts = {phase: statistics.median(step.get(f"seconds/{phase}", 0.0) for step in steps) for phase in PHASES}
    rest = [step["seconds"] - sum(step.get(f"seconds/{phase}", 0.0) for phase in PHASES) for step in steps]
    return {"step": statistics.median(step["seconds"] for step in steps), **parts, "rest": statistics.median(rest)}
