# SPDX-License-Identifier: Apache-2.0
"""The plan as a table for a person and as JSON for a program."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jgrpo.config import RunConfig
from jgrpo.core.tree import Layout
from jgrpo.planning.arrays import LARGEST_GROUP, Clip, Lengths
from jgrpo.planning.cost import Collective
from jgrpo.planning.measure import Measured
from jgrpo.planning.topology import Slice

GIB = 2**30
LARGEST = 10  # collectives of a program in the JSON file

NOTE = """\
An estimate, not a measurement: memory is the TPU compiler's; seconds are the least that the chip's stated peaks allow
for the products, the HBM traffic and what is sent, with 1 us for each hop, as it stands in the compiled programs. A
rollout goes on to the limit, as it does where one completion has that length. Rewards, data and checkpoints are not in
it."""


@dataclass(frozen=True)
class Plan:
    """What a run needs of a slice, for prompts with a clip of one bucket.

    Attributes:
        lengths: what completions are taken to be like; the times of score and update are for them.
        layout: of their prefix trees.
        weights: how they lie in the rollout, and why.
        resident: bytes on one chip of what a run keeps there all the time, by name.
    """

    place: Slice
    config: RunConfig
    model: str
    clip: Clip
    lengths: Lengths
    layout: Layout
    weights: str
    resident: dict[str, float]
    programs: tuple[Measured, ...]

    @property
    def fits(self) -> bool:
        """Whether every program runs."""
        return all(program.fits(self.place.chip) for program in self.programs)

    @property
    def step_seconds(self) -> float:
        """Seconds of a training step at least; infinite where a program of it did not fit."""
        return sum(program.times * self.program_seconds(program) for program in self.programs if program.times)

    def program_seconds(self, program: Measured) -> float:
        """Seconds of one call at least."""
        return max(program.seconds(self.place.chip).values(), default=float("inf"))


def plan_text(plan: Plan) -> str:
    """Return the plan for a person to read."""
    config, place, mesh = plan.config, plan.place, plan.config.mesh
    grpo = getattr(config, "grpo", None)
    samples = f" x {grpo.num_samples} completions of {config.max_completion_tokens} tokens" if grpo else ""
    held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.resident.items())
    lines = [
        f"{plan.model} on {place.name}: {place.chips} chips of {place.chip.hbm / GIB:.2f} GiB; "
        f"mesh data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}",
        f"a step: {config.prompts_per_step} prompts{samples}, {config.micro_batches} micro-batches, remat "
        f"{config.model.remat}; clips of {plan.clip.seconds:g} s ({plan.clip.frames} frames), prompts of "
        f"{plan.clip.tokens} tokens",
        _assumed(plan),
        plan.weights,
        f"always on a chip, GiB: {held}; together {sum(plan.resident.values()) / GIB:.2f}",
        "",
        *_aligned(_memory_rows(plan)),
        "",
        *_aligned(_time_rows(plan)),
        "",
        *_aligned(_collective_rows(plan)),
        "",
        NOTE,
        "",
        _verdict(plan),
    ]
    return "\n".join(line for line in lines if line is not None) + "\n"


def _assumed(plan: Plan) -> str:
    """Return what score and update are planned for."""
    lengths, (trees, slots) = plan.lengths, plan.layout
    if lengths.mean is None:
        return (
            f"assumed: every completion has all {plan.config.max_completion_tokens} tokens and shares none "
            f"(--mean-length, --sharing), so what learns from them runs {trees} trees of {slots} slots"
        )
    return (
        f"assumed: completions of {lengths.mean:g} tokens, {lengths.sharing:g} times their distinct beginnings, the "
        f"largest group of a step {LARGEST_GROUP:g} times the mean, so what learns from them runs {trees} trees of "
        f"{slots} slots; memory is that of the largest layout"
    )


def _memory_rows(plan: Plan) -> list[list[str]]:
    chip = plan.place.chip
    rows = [["HBM of a chip, GiB", "arguments", "outputs", "temporaries", "beside", "total", "of it", "compiled in"]]
    for program in plan.programs:
        memory = program.memory
        if program.cost is None:
            sizes = ["", "", "", "", f"{memory.total / GIB:.2f}"]
        else:
            parts = (memory.arguments, memory.outputs, memory.temporaries, memory.beside, memory.total)
            sizes = [f"{size / GIB:.2f}" for size in parts]
        share = f"{memory.total / chip.hbm:.0%}" + ("" if program.fits(chip) else " TOO MUCH")
        rows.append([program.name, *sizes, share, f"{program.compile_seconds:.0f} s"])
    return rows


def _time_rows(plan: Plan) -> list[list[str]]:
    rows = [["of a chip, one call", "TFLOP", "expected", "HBM GiB", "sent GiB", "seconds", "bound by", "calls a step"]]
    for program in plan.programs:
        if program.cost is None:
            continue
        cost, seconds = program.cost, program.seconds(plan.place.chip)
        rows.append(
            [
                program.name,
                f"{cost.flops / 1e12:.3f}",
                f"{program.expected_flops / 1e12:.3f}",
                f"{cost.hbm_bytes / GIB:.2f}",
                f"{cost.sent / GIB:.3f}",
                f"{max(seconds.values()):.3f}",
                max(seconds, key=seconds.get),
                str(program.times),
            ]
        )
    return [*rows, ["a training step", "", "", "", "", f"{plan.step_seconds:.3f}", "", ""]]


def _collective_rows(plan: Plan) -> list[list[str]]:
    rows = [
        ["collectives of a chip", "kind", "outside loops", "MiB sent", "in loops", "MiB sent", "over tokens", "MiB"]
    ]
    for program in plan.programs:
        for kind, found in collectives_by_kind(program.cost.collectives if program.cost else []).items():
            cells = [program.name, kind]
            for part in ("outside", "inside", "over_tokens"):
                cells += [f"{found[part]['count']:.0f}", f"{found[part]['bytes'] / 2**20:.1f}"]
            rows.append(cells)
    return rows


def collectives_by_kind(collectives: Sequence[Collective]) -> dict[str, dict[str, dict[str, float]]]:
    """Return {kind: {place: {count, bytes}}}, the kind that sends most first.

    The places: outside of all loops, inside of those of known length alone (layers, micro-batches, chunks), and over
    tokens, in a loop whose end the data decides.
    """
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(
        lambda: {part: {"count": 0.0, "bytes": 0.0} for part in ("outside", "inside", "over_tokens")}
    )
    for one in collectives:
        part = "outside" if not one.loops else "over_tokens" if None in one.loops else "inside"
        found[one.kind][part]["count"] += one.count
        found[one.kind][part]["bytes"] += one.sent
    return dict(sorted(found.items(), key=lambda item: -sum(part["bytes"] for part in item[1].values())))


def _verdict(plan: Plan) -> str:
    chip = plan.place.chip
    worst = max(plan.programs, key=lambda program: program.memory.total)
    size = f"{worst.name} takes {worst.memory.total / GIB:.2f} of {chip.hbm / GIB:.2f} GiB"
    if plan.fits:
        return f"It fits: {size}. A step takes at least {plan.step_seconds:.2f} s."
    return (
        f"It does not fit: {size}. Use more micro-batches, remat full, a larger fsdp or tensor axis, or a larger "
        "slice; --search tries meshes and micro-batches."
    )


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON has it: bytes and seconds, of one chip and one call."""
    chip = plan.place.chip
    return {
        "topology": plan.place.name,
        "chips": plan.place.chips,
        "chip": {name: value for name, value in dataclasses.asdict(chip).items() if name not in ("shapes", "options")},
        "model": plan.model,
        "mesh": dataclasses.asdict(plan.config.mesh),
        "micro_batches": plan.config.micro_batches,
        "prompts_per_step": plan.config.prompts_per_step,
        "remat": plan.config.model.remat,
        "audio_seconds": plan.clip.seconds,
        "audio_frames": plan.clip.frames,
        "prompt_tokens": plan.clip.tokens,
        "mean_length": plan.lengths.mean or plan.config.max_completion_tokens,
        "sharing": plan.lengths.sharing,
        "trees": plan.layout[0],
        "slots": plan.layout[1],
        "rollout_weights": plan.weights,
        "resident": plan.resident,
        "programs": [_program_json(plan, program) for program in plan.programs],
        "step_seconds": plan.step_seconds if plan.fits else None,
        "fits": plan.fits,
    }


def _program_json(plan: Plan, program: Measured) -> dict[str, Any]:
    found = {
        "name": program.name,
        "calls_per_step": program.times,
        "fits": program.fits(plan.place.chip),
        "memory": {**dataclasses.asdict(program.memory), "total": program.memory.total},
        "compile_seconds": program.compile_seconds,
    }
    if program.cost is None:
        return found
    largest = sorted(program.cost.collectives, key=lambda one: -one.sent)[:LARGEST]
    return found | {
        "flops": program.cost.flops,
        "expected_flops": program.expected_flops,
        "hbm_bytes": program.cost.hbm_bytes,
        "sent_bytes": program.cost.sent,
        "hops": program.cost.hops,
        "seconds": program.seconds(plan.place.chip),
        "collectives": collectives_by_kind(program.cost.collectives),
        "largest_collectives": [dataclasses.asdict(one) for one in largest],
        "loops_counted_once": program.cost.unknown_loops,
    }
