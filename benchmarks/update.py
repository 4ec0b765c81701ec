"""The update: samples a second, FLOPs against the machine's matrix peak, and what each option of it costs or saves.

    python -m benchmarks.update
    python -m benchmarks.update --new-tokens 200 --mean-length 25 --sharing 2
    python -m benchmarks.update --model granite-speech-3.3-2b --dtype bfloat16 --json update.json       # GPU or TPU

`update` is the update of a run: forward, loss, gradient, AdamW, with the prompt and what completions have in common
computed once per group. `rows` shares no beginnings of completions, `every column` pads each of them to T, and `prefix
off` takes the same completions as P * G prompts of one sample each; the loss must be the same, and the script fails if
it is not. The others change one option: how many tokens' logits exist at a time, what the backward pass recomputes, how
many micro-batches there are, and whether there is a reference (beta).
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from benchmarks.floors import Peak, update_flops
from benchmarks.harness import Report, Timing, arguments, chosen, measure, run
from benchmarks.workload import Size, Workload, planned_calls
from jgrpo.core.tree import Layout, sort_rows
from jgrpo.planning.arrays import LONGEST
from jgrpo.planning.cost import program_cost
from jgrpo.planning.measure import compile_call
from jgrpo.programs.steps import Targets
from jgrpo.runtime.rows import place
from model_port.batch import Completions, Trees

OPTIONS = {
    "logprob chunk 256": {"model": {"logprob_chunk": 256}},
    "logprob chunk 1024": {"model": {"logprob_chunk": 1024}},
    "remat dots": {"model": {"remat": "dots"}},
    "remat full": {"model": {"remat": "full"}},
    "2 micro-batches": {"micro_batches": 2},
    "4 micro-batches": {"micro_batches": 4},
    "beta 0": {"grpo": {"beta": 0.0}},
}
OTHER_SHAPES = ("rows", "every column", "prefix off")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss and the gradient's norm, relative


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    options = arguments(__doc__, new_tokens=50, lengths=True).parse_args(argv)
    size = Size.of(options)
    wanted = chosen(dict.fromkeys(("update", *OTHER_SHAPES, *OPTIONS)), options.only)
    report = Report("update", dataclasses.asdict(size) | {"rounds": options.rounds})
    base = Workload(size)
    completions = base.completions()
    targets = base.targets(completions)
    workloads = {"update": (base, targets)}
    shapes = {
        "rows": lambda: (base.variant(), base.targets(completions, share=False)),
        "every column": lambda: (base.variant(), base.targets(completions, layout=_largest(base), share=False)),
        "prefix off": lambda: _ungrouped(base, completions),
    }
    workloads |= {name: make() for name, make in shapes.items() if name in wanted}
    for name in wanted:
        if name in OPTIONS:
            other = base.variant(**OPTIONS[name])
            workloads[name] = (other, other.targets(completions))
    peak = Peak(size.dtype)
    first = {}

    def step(name):
        workload, targets = workloads[name]
        metrics = workload.update(targets)
        first.setdefault(name, metrics)
        return metrics

    cases = {name: functools.partial(step, name) for name in workloads}
    timings = measure({**cases, "matrix peak": peak.matrix}, rounds=options.rounds)
    for name in OTHER_SHAPES:
        if name in first:
            _check_same(report, name, first["update"], first[name], rtol=TOLERANCE[size.dtype])
    _table(report, base, completions, targets.trees, timings, peak)
    return report.finish(options.json)


def _largest(base: Workload) -> Layout:
    return LONGEST.layout(base.run, base.clip)


def _ungrouped(base: Workload, completions: Completions) -> tuple[Workload, Targets]:
    """Return the same prompts and completions as P * G groups of one."""
    prompts, samples = base.size.prompts, base.size.samples
    size = dataclasses.replace(base.size, prompts=prompts * samples, samples=1, mean_length=None, sharing=1.0)
    other = Workload(size, params=base.params)
    # On the host, where it takes no program for every array.
    inputs = jax.tree.map(lambda x: np.repeat(np.asarray(x), samples, axis=0), (base.batch, base.encoded))
    other.batch, other.encoded = place(inputs, base.run.mesh)
    apart = jax.tree.map(lambda x: x.reshape(prompts * samples, 1, *x.shape[2:]), completions)
    return other, other.targets(apart, layout=_largest(other))


def _check_same(report: Report, name: str, ours: dict[str, Any], others: dict[str, Any], *, rtol: float) -> None:
    """Compare the first step taken both ways."""
    for metric in ("loss", "grad_norm"):
        value, other = float(ours[metric]), float(others[metric])
        if not np.isclose(value, other, rtol=rtol, atol=1e-6):
            raise RuntimeError(f"{metric} is {value} in an update and {other} with {name}; they must be the same")
        report.note(f"{metric} of the first step: {value:.7f} in an update, {other:.7f} with {name}.")


def _table(
    report: Report,
    base: Workload,
    completions: Completions,
    trees: Trees,
    timings: dict[str, Timing],
    peak: Peak,
) -> None:
    size, run, clip = base.size, base.run, base.clip
    layout, tokens = trees.ends.shape[1:], int(completions.mask.sum())
    report.note(
        f"L {clip.tokens}; completions of {completions.mask.sum(-1).mean():.1f} tokens on average, "
        f"{tokens / sort_rows(completions.tokens, completions.mask).distinct.sum():.2f} times their distinct "
        f"beginnings: {layout[0]} trees of {layout[1]} slots a group."
    )
    matrix = peak.flops_per_second(timings["matrix peak"])
    whole = timings["update"].median
    # What is useful is told by formula where all completions have T tokens.
    useful = None
    if size.mean_length is None:
        useful = update_flops(run, clip, size.prompts, size.samples, size.new_tokens)
        done = _done_flops(size)
        report.settings |= {"useful_flops": useful, "done_flops": done}
        counted = (
            ""
            if done is None
            else f"; the compiled program does {done / 1e9:,.2f}, recomputed and masked ones included"
        )
        report.note(f"Useful GFLOP of an update: {useful / 1e9:,.2f}{counted}.")
        report.note(f"utilisation: useful FLOPs a second over the matrix peak, {matrix / 1e9:,.0f} GFLOP/s measured.")
    for name, timing in timings.items():
        if name == "matrix peak":
            continue
        report.row(
            case=name,
            seconds=timing.median,
            low=timing.low,
            high=timing.high,
            first_call=timing.first,
            samples_per_second=size.prompts * size.samples / timing.median,
            utilisation=None if useful is None else useful / timing.median / matrix,
            ratio=timing.median / whole,
        )
    report.settings |= {"prompt_tokens": clip.tokens, "layout": list(layout), "matrix_peak": matrix}


def _done_flops(size: Size) -> float | None:
    """Return the FLOPs of the matrix products in the compiled program; None where they hide in library calls."""
    if jax.default_backend() == "gpu":
        return None
    run, calls = planned_calls(size)
    return program_cost(compile_call(calls["update"], run.mesh).text, devices=1).flops


if __name__ == "__main__":
    run(main)
