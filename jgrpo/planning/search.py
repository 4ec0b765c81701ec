# SPDX-License-Identifier: Apache-2.0
"""Mesh shapes and micro-batches of a run on a slice: the ones that look best by arithmetic are compiled and ranked."""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jgrpo.config import RunConfig
from jgrpo.planning.estimate import Estimate, divisors, meshes
from model_port.errors import UserError
from model_port.partition import MeshConfig


@dataclass(frozen=True)
class Candidate:
    """A way to run a config on a slice; the numbers of the run stay the same."""

    config: RunConfig
    estimate: Estimate

    def options(self) -> str:
        """Return it as options of the command line."""
        mesh = self.config.mesh
        return (
            f"--mesh.data {mesh.data} --mesh.fsdp {mesh.fsdp} --mesh.tensor {mesh.tensor} "
            f"--micro-batches {self.config.micro_batches} --eval.batch-size {self.config.eval.batch_size}"
        )


def variants(config: RunConfig, chips: int) -> Iterator[RunConfig]:
    """Give the config on every mesh of so many chips, in every number of micro-batches that its prompts allow."""
    for data, fsdp, tensor in meshes(chips):
        shards = data * fsdp
        minibatches = config.grpo.num_minibatches if hasattr(config, "grpo") else 1
        if config.prompts_per_step % (shards * minibatches):
            continue
        batch = math.ceil(config.eval.batch_size / shards) * shards
        for pieces in divisors(config.prompts_per_step // (shards * minibatches)):
            yield dataclasses.replace(
                config,
                mesh=MeshConfig(data, fsdp, tensor),
                micro_batches=pieces,
                eval=dataclasses.replace(config.eval, batch_size=batch),
            )


def candidates(
    config: RunConfig, chips: int, *, hbm: float, estimate: Callable[[RunConfig], Estimate]
) -> tuple[list[Candidate], list[str]]:
    """Return what may fit, by rising estimated seconds, and why the rest does not, one line each.

    Args:
        hbm: bytes of one chip.
        estimate: of a config; raises UserError for one that cannot run.

    Raises:
        UserError: neither the prompts of a step nor the model divide over a mesh of so many chips.
    """
    found, dropped, refused = [], [], {}
    for variant in variants(config, chips):
        try:
            variant.validate()
            candidate = Candidate(variant, estimate(variant))
        except UserError as error:
            # What is wrong with a mesh is so in any number of micro-batches.
            refused[_mesh(variant)] = f"{_mesh(variant)}: {error}"
            continue
        if candidate.estimate.memory > hbm:
            needed = candidate.estimate.memory / 2**30
            pieces = f"{variant.micro_batches} micro-batches"
            dropped.append(f"{_mesh(variant)}, {pieces}: needs at least {needed:.1f} GiB of {hbm / 2**30:.2f}")
        else:
            found.append(candidate)
    dropped += refused.values()
    if not found and len(dropped) == len(refused):
        tried = "".join(f"\n  {line}" for line in dropped)
        raise UserError(
            f"no mesh of {chips} chips can run this: prompts_per_step {config.prompts_per_step} must be a multiple of "
            f"data x fsdp, and of grpo.num_minibatches times that, and the model must divide over tensor; set "
            f"--prompts-per-step {chips}, or a smaller divisor of {chips} with tensor for the rest{tried}"
        )
    return sorted(found, key=lambda candidate: candidate.estimate.seconds), dropped


def search(
    found: list[Candidate], plan: Callable[[RunConfig], "object"], *, tries: int, say: Callable[[str], None]
) -> list[tuple[Candidate, object]]:
    """Compile the most promising candidates; return those that were compiled with their plans, the best first.

    Of each mesh, the fastest number of micro-batches comes first, and the next one only if that does not fit.

    Args:
        plan: of a config; it has `fits` and `step_seconds`.
        tries: candidates to compile at most.
        say: shows progress.
    """
    queues: dict[MeshConfig, list[Candidate]] = {}
    for candidate in found:
        queues.setdefault(candidate.config.mesh, []).append(candidate)
    order = itertools.count()
    heap = [(queue[0].estimate.seconds, next(order), queue) for queue in queues.values()]
    heapq.heapify(heap)
    compiled = []
    while heap and len(compiled) < tries:
        _, _, queue = heapq.heappop(heap)
        candidate = queue.pop(0)
        outcome = plan(candidate.config)
        compiled.append((candidate, outcome))
        state = f"{outcome.step_seconds:.2f} s a step" if outcome.fits else "does not fit"
        say(f"{len(compiled)} of {tries}: {candidate.options()}: {state}")
        if not outcome.fits and queue:
            heapq.heappush(heap, (queue[0].estimate.seconds, next(order), queue))
    return sorted(compiled, key=lambda pair: (not pair[1].fits, pair[1].step_seconds))


def _mesh(config: RunConfig) -> str:
    mesh = config.mesh
    return f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}"
