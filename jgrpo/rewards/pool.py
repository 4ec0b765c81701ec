# SPDX-License-Identifier: Apache-2.0
"""Rewards computed beside the training loop: in a thread, and in processes for what needs the host alone."""

import logging
import multiprocessing
import multiprocessing.synchronize
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import jax
import numpy as np

from jgrpo.config import MetricOptions
from jgrpo.rewards.built_in import ON_DEVICE
from jgrpo.rewards.overlap import DEFAULT_OPTIONS
from jgrpo.rewards.reward import Answers, Reward, SourceRewards, make_reward
from jgrpo.runtime.worker import start_worker
from model_port.errors import UserError


class RewardPool:
    """Computes the components of a reward in the background, in the order submitted.

    Without workers a single thread computes them. With workers that thread shares the examples out, in equal runs of
    neighbours, to processes that live as long as the pool; components that need the device stay in the thread. A
    function of the user's thus sees a part of the examples at a time and must score each by itself.

        with RewardPool({"bleu": 1.0}, workers=4) as pool:
            scores = pool.submit(completions, references, columns)
            ...  # the device samples meanwhile
            components = scores.result()

    A program that starts workers must guard what it does by `if __name__ == "__main__":`, as the workers import it.

    Attributes:
        reward: the same reward in this process, for its names, weights and `total`; of a mixture, SourceRewards.

    Args:
        spec, options, scale: as for make_reward, errors too; or a spec for each source of a mixture.
        workers: number of processes.
    """

    def __init__(
        self,
        spec: str | Mapping[str, float | int] | tuple[Mapping[str, float | int], ...],
        workers: int,
        *,
        options: MetricOptions = DEFAULT_OPTIONS,
        scale: str = "none",
    ):
        if workers < 0:
            raise UserError(f"reward workers are {workers}: give 0 or more.")
        if isinstance(spec, tuple):
            self.reward = SourceRewards(tuple(make_reward(one, options=options, scale=scale) for one in spec))
            functions = {name: function for part in self.reward.parts for name, function in part.functions.items()}
        else:
            self.reward = make_reward(spec, options=options, scale=scale)
            functions = self.reward.functions
        shared = [name for name in functions if name not in ON_DEVICE] if workers else []
        here = [name for name in functions if name not in shared]
        self._here = Reward(dict.fromkeys(here, 1.0), {name: functions[name] for name in here})
        self._workers = workers
        self._processes = None
        if shared:
            context = multiprocessing.get_context("spawn")  # a forked copy of a process with JAX's threads may hang
            self._processes = ProcessPoolExecutor(
                workers,
                mp_context=context,
                initializer=_start_worker,
                initargs=(dict.fromkeys(shared, 1.0), options, context.Lock()),
            )
            for _ in range(workers):  # start them all now, while the model is loaded
                self._processes.submit(int)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def submit(
        self,
        completions: Sequence[str],
        references: Sequence[str],
        columns: Mapping[str, Sequence] | None = None,
        sources: Sequence[int] | None = None,
    ) -> Future:
        """Start scoring; the future's `result()` is that of Reward.components, and raises as it does.

        It also raises a UserError if a worker process died.

        Args:
            sources: of a mixture, which source each example is of: it is scored by that one's components, and has NaN
                in the others.
        """
        examples = Answers.make(completions, references, columns or {})
        if sources is None:
            return self._thread.submit(self._score, examples, self.reward.names)
        return self._thread.submit(self._score_sources, examples, np.asarray(sources))

    def _score_sources(self, examples: Answers, sources: np.ndarray) -> dict[str, np.ndarray]:
        scores = {name: np.full(len(examples), np.nan) for name in self.reward.names}
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            own = self._score(examples.take(rows.tolist()), self.reward.parts[source].names)
            for name, values in own.items():
                scores[name][rows] = values
        return scores

    def _score(self, examples: Answers, names: Sequence[str]) -> dict[str, np.ndarray]:
        here = [name for name in names if name in self._here.functions]
        shared = [name for name in names if name not in self._here.functions]
        parts = []
        try:
            if shared and len(examples):
                bounds = np.linspace(0, len(examples), min(self._workers, len(examples)) + 1).astype(int)
                parts = [
                    self._processes.submit(_score_in_worker, examples.part(int(start), int(stop)), shared)
                    for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
                ]
            scores = self._here.score(examples, here)
            done = [part.result() for part in parts]
        except BrokenProcessPool as error:
            raise UserError(
                "a reward worker process died: it ran out of memory, was killed, a reward function crashed or left the "
                'interpreter, or the program does not guard its start by `if __name__ == "__main__":`. Set '
                "grpo.reward_workers to 0 to see what happens in the training process."
            ) from error
        if done:
            scores |= {name: np.concatenate([part[name] for part in done]) for name in done[0]}
        return {name: scores.get(name, np.empty(0)) for name in names}

    def close(self) -> None:
        """Drop what has not been started, wait for what has, and end the workers."""
        self._thread.shutdown(cancel_futures=True)
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


_reward: Reward | None = None


def _start_worker(spec: Mapping[str, float | int], options: MetricOptions, speaker: multiprocessing.synchronize.Lock):
    """Build the reward of this worker process; our warnings are logged by the one worker that gets the lock."""
    global _reward
    if not speaker.acquire(block=False):
        logging.getLogger("jgrpo").setLevel(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")  # a function that uses JAX must not reach for the trainer's device
    start_worker()
    _reward = make_reward(spec, options=options)


def _score_in_worker(examples: Answers, names: Sequence[str]) -> dict[str, np.ndarray]:
    return _reward.score(examples, names)
