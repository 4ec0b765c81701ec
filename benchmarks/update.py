"""The update: samples a second, FLOPs against the machine's matrix peak, and what each option of it costs or saves.

    python -m benchmarks.update
    python -m benchmarks.update --model granite-speech-3.3-2b --dtype bfloat16 --json update.json       # GPU or TPU

`update` is the update of a run: forward, loss, gradient, AdamW, with the prompt computed once per group. `prefix off`
takes the same completions as P * G prompts of one sample each; the loss must be the same, and the script fails if it is
not. The others change one option: how many tokens' logits exist at a time, what the backward pass recomputes, how many
micro-batches there are, and whether there is a reference (beta).
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from benchmarks.floors import Peak, update_flops
from benchmarks.harness import Report, Timing, arguments, chosen, measure, run
from benchmarks.workload import Size, Workload, planned_calls
from jgrpo.planning.cost import program_cost
from jgrpo.planning.measure import compile_call
from jgrpo.runtime.rows import place
from jgrpo.steps import Targets

OPTIONS = {
    "logprob chunk 256": {"model": {"logprob_chunk": 256}},
    "logprob chunk 1024": {"model": {"logprob_chunk": 1024}},
    "remat dots": {"model": {"remat": "dots"}},
    "remat full": {"model": {"remat": "full"}},
    "2 micro-batches": {"micro_batches": 2},
    "4 micro-batches": {"micro_batches": 4},
    "beta 0": {"grpo": {"beta": 0.0}},
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss and the gradient's norm, relative


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    options = arguments(__doc__, new_tokens=50).parse_args(argv)
    size = Size.of(options)
    wanted = chosen({"update": None, "prefix off": None, **OPTIONS}, options.only)
    report = Report("update", dataclasses.asdict(size) | {"rounds": options.rounds})
    base = Workload(size)
    completions = base.rollout()
    targets = base.targets(completions)
    workloads = {"update": (base, targets)}
    if "prefix off" in wanted:
        workloads["prefix off"] = _ungrouped(base, targets)
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
    if "prefix off" in first:
        _check_same(report, first["update"], first["prefix off"], rtol=TOLERANCE[size.dtype])
    _table(report, base, timings, peak)
    return report.finish(options.json)


def _ungrouped(base: Workload, targets: Targets) -> tuple[Workload, Targets]:
    """Return the same prompts and completions as P * G groups of one."""
    prompts, samples = base.size.prompts, base.size.samples
    size = dataclasses.replace(base.size, prompts=prompts * samples, samples=1)
    other = Workload(size, params=base.params)
    # On the host, where it takes no program for every array.
    inputs = jax.tree.map(lambda x: np.repeat(np.asarray(x), samples, axis=0), (base.batch, base.encoded))
    apart = jax.tree.map(lambda x: np.asarray(x).reshape(prompts * samples, 1, *x.shape[2:]), targets)
    (other.batch, other.encoded), apart = place((inputs, apart), base.run.mesh)
    return other, apart


def _check_same(report: Report, shared: dict[str, Any], apart: dict[str, Any], *, rtol: float) -> None:
    """Compare the first step taken both ways."""
    for name in ("loss", "grad_norm"):
        value, other = float(shared[name]), float(apart[name])
        if not np.isclose(value, other, rtol=rtol, atol=1e-6):
            raise RuntimeError(f"{name} is {value} with the shared prefix and {other} without; they must be the same")
        report.note(f"{name} of the first step: {value:.7f} with the shared prefix, {other:.7f} without.")


def _table(report: Report, base: Workload, timings: dict[str, Timing], peak: Peak) -> None:
    size, run, clip = base.size, base.run, base.clip
    useful = update_flops(run, clip, size.prompts, size.samples, size.new_tokens)
    matrix = peak.flops_per_second(timings["matrix peak"])
    whole = timings["update"].median
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
            utilisation=useful / timing.median / matrix,
            ratio=timing.median / whole,
        )
    done = _done_flops(size)
    report.settings |= {"prompt_tokens": clip.tokens, "useful_flops": useful, "matrix_peak": matrix, "done_flops": done}
    counted = (
        "" if done is None else f"; the compiled program does {done / 1e9:,.2f}, recomputed and masked ones included"
    )
    report.note(f"L {clip.tokens}. Useful GFLOP of an update: {useful / 1e9:,.2f}{counted}.")
    report.note(f"utilisation: useful FLOPs a second over the matrix peak measured here, {matrix / 1e9:,.0f} GFLOP/s.")


def _done_flops(size: Size) -> float | None:
    """Return the FLOPs of the matrix products in the compiled program; None where they hide in library calls."""
    if jax.default_backend() == "gpu":
        return None
    run, calls = planned_calls(size)
    return program_cost(compile_call(calls["update"], run.mesh).text, devices=1).flops


if __name__ == "__main__":
    run(main)
