# SPDX-License-Identifier: Apache-2.0
"""The rollout of a step: groups sampled in chunks, scored while the device goes on, replaced where they teach nothing.

With several chunks the device samples one while the host computes the rewards of those before it. What is sampled does
not depend on their number: every row has a key of its own.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jgrpo.config import GRPOConfig
from jgrpo.core.advantages import zero_variance
from jgrpo.data.pipeline import PromptBatch
from jgrpo.programs.steps import truncation
from jgrpo.rewards import RewardPool
from jgrpo.rollout.scoring import (
    ended,
    fill_groups,
    flat_examples,
    score_groups,
    step_keys,
    with_references,
)
from jgrpo.runtime.rows import fetch, gather, own_rows, place
from jgrpo.setup import Run
from model_port.batch import Batch, Completions


@dataclass(frozen=True)
class Scores:
    """What is known of the groups of all P prompts of a step, those of other processes too.

    Attributes:
        rewards: of each completion.
        components: of the rewards, [P, G] each.
        lengths: of the completions in tokens.
        ended: whether each completion ended by itself.
        sources: of the prompts, in a mixture.
    """

    rewards: Float[np.ndarray, "P G"]
    components: dict[str, np.ndarray]
    lengths: Int[np.ndarray, "P G"]
    ended: Bool[np.ndarray, "P G"]
    sources: Int[np.ndarray, " P"] | None = None


@dataclass(frozen=True)
class Groups:
    """This process's prompts of a step with their completions.

    Attributes:
        rows: which of the step's prompts these are.
        batch: of the prompts, on the mesh.
        encoded: encoder output of the clips, on the mesh.
        completions: on the host; in a mixed-policy run the last of a group is the reference.
        jobs: the rewards of each chunk, which the host is computing.
        scores: those of all processes, where dynamic sampling has waited for them.
        metrics: of dynamic sampling.
    """

    rows: Int[np.ndarray, " N"]
    prompts: PromptBatch
    batch: Batch
    encoded: jax.Array
    completions: Completions
    jobs: Sequence[Future] = ()
    scores: Scores | None = None
    metrics: dict[str, int] = field(default_factory=dict)


class GroupSampler:
    """Samples and scores the groups of a step as a run is configured."""

    def __init__(self, run: Run, pool: RewardPool, config: GRPOConfig):
        self._run, self._pool, self._config = run, pool, config
        self._sampling = {
            "num_tokens": config.max_completion_tokens,
            "temperature": config.grpo.temperature,
            **truncation(config.grpo),
        }

    def __call__(self, prompts: PromptBatch) -> Groups:
        """Return the groups of the run's current step."""
        groups = self._sample(prompts)
        return self._replace(groups) if self._config.grpo.dynamic_sampling else groups

    def _sample(self, prompts: PromptBatch, *, round: int = 0) -> Groups:
        """Sample a group for every prompt and start their rewards; `round` is 0 for the prompts of the stream."""
        run, grpo = self._run, self._config.grpo
        batch, encoded = self._encode(prompts)
        with run.timer("rollout"):
            # All chunks wait in the device's queue before the first is fetched.
            outs = self._start(batch, encoded, round)
        hosts, jobs = [], []
        for part, out in enumerate(outs):
            rows = slice(part, None, len(outs))
            with run.timer("rollout"):
                host = fetch(out)
            with run.timer("reward"):
                host = with_references(host, prompts, rows) if grpo.mixed_policy else host
                texts = run.policy.processor.decode(host)
                jobs.append(self._pool.submit(*flat_examples(texts, prompts, rows)))
            hosts.append(host)
        completions = jax.tree.map(_interleave, *hosts)
        return Groups(self._own_rows(), prompts, batch, encoded, completions, jobs)

    def _encode(self, prompts: PromptBatch) -> tuple[Batch, jax.Array]:
        run = self._run
        with run.timer("encode"):
            batch = place(prompts.batch, run.policy.mesh)
            return batch, jax.block_until_ready(run.encode(run.state.params, run.data, prompts, batch))

    def _keys(self, round: int) -> jax.Array:
        """Return the keys of this process's rows."""
        config, sampled = self._config, self._config.grpo.num_samples - self._config.grpo.mixed_policy
        shape = {"num_prompts": config.prompts_per_step, "num_samples": sampled}
        return step_keys(config.seed, self._run.step, round=round, **shape)[self._own_rows()]

    def _own_rows(self) -> Int[np.ndarray, " P"]:
        return own_rows(self._run.policy.mesh, self._config.prompts_per_step)

    def _start(self, batch: Batch, encoded: jax.Array, round: int) -> list[Completions]:
        """Start sampling, chunk by chunk; chunk k holds the rows k, k + chunks, ..."""
        run, parts = self._run, self._config.grpo.rollout_chunks
        outs, arrays = [], (batch, encoded)
        weights = run.programs.layout(run.state.params, run.policy.frozen)
        for part in range(parts):
            chunk = arrays if parts == 1 else run.programs.share(arrays, part, parts=parts)
            keys = place(self._keys(round)[part::parts], run.policy.mesh)
            outs.append(run.programs.rollout(*weights, *chunk, keys, **self._sampling))
        return outs

    def gather_scores(self, groups: Groups) -> Scores:
        """Wait for the components of all chunks, make rewards of them, and share them with all processes."""
        if groups.scores is not None:
            return groups.scores
        completions, sources = groups.completions, groups.prompts.sources
        lengths = completions.mask.sum(-1)
        parts = [job.result() for job in groups.jobs]
        shape = (-1, lengths.shape[1])
        components = {name: _interleave(*(part[name].reshape(shape) for part in parts)) for name in parts[0]}
        settings = {"limit": self._config.max_completion_tokens, "sources": sources}
        scored = score_groups(self._pool.reward, components, lengths, self._config.grpo, **settings)
        eos = ended(completions, self._run.policy.processor.eos_ids)
        return Scores(*gather((*scored, lengths, eos, sources), self._run.policy.mesh))

    def _replace(self, groups: Groups) -> Groups:
        """Put groups of further prompts in place of those whose rewards are all equal, as far as some are found.

        Every process decides for all prompts by the same arrays, so all of them agree on what to do next.
        """
        run, most = self._run, self._config.grpo.dynamic_sampling
        table, rounds, replaced = self._table(groups), 0, 0
        while rounds < most and zero_variance(table["rewards"]).any():
            with run.timer("data"):
                prompts = run.data.further(seed=self._config.seed, index=run.step * most + rounds)
            rounds += 1
            table, count = fill_groups(table, self._table(self._sample(prompts, round=rounds)))
            replaced += count
        indices, out, rows = table.pop("indices"), table.pop("completions"), self._own_rows()
        known = {"scores": Scores(**table), "metrics": {"dynamic/rounds": rounds, "dynamic/replaced": replaced}}
        if not replaced:
            return dataclasses.replace(groups, **known)
        with run.timer("data"):
            prompts = run.data.gather(indices)
        completions = jax.tree.map(lambda values: values[rows], out)
        return Groups(rows, prompts, *self._encode(prompts), completions, **known)

    def _table(self, groups: Groups) -> dict[str, Any]:
        """Wait for the rewards and return all that is known of the groups of all processes, prompts first."""
        with self._run.timer("reward_wait"):
            scores = self.gather_scores(groups)
        arrays = {"completions": groups.completions, "indices": groups.prompts.indices}
        return {**vars(scores), **gather(arrays, self._run.policy.mesh)}


def _interleave(*parts: np.ndarray) -> np.ndarray:
    """Put the rows k, k + parts, ... of each part k together."""
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
