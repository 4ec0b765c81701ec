"""Sampling: tokens a second, where the time goes, how far the floor is, and what each part of the design saves.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --model granite-speech-3.3-2b --dtype bfloat16 --json rollout.json     # GPU or TPU

Parts: `encode` (once per prompt and step, not at all with data.cache_encoder), `prefill` (a rollout of one token) and
`decode` (the difference to a rollout of T tokens, which are always that many).
Ablations: `early exit` (an eighth of the vocabulary ends a completion, and the loop stops when the last one has ended),
`prefix off` (every sample a prompt of its own: G prefills, G copies of the prompt's keys and values), `encoder off`
(the encoder run for every sample, not for every prompt), `layers scanned` or `layers unrolled` (the one that is not the
default on this machine), `cache` in the other dtype, and over four devices how weights lie while tokens are decoded. On
a machine without four devices the last is done on virtual ones of the CPU, in a process of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.floors import Peak, encode_flops, prefill_flops, token_step_bytes, token_step_flops
from benchmarks.harness import Report, Timing, arguments, chosen, in_child, measure, run
from benchmarks.workload import Size, Workload
from model_port.decoder import unrolled_on
from model_port.partition import MeshConfig

ENDS_AFTER = 8
LAYOUT_DEVICES = 4
LAYOUTS = {
    "data=4": (MeshConfig(data=4), "gathered"),
    "fsdp=4 gathered": (MeshConfig(fsdp=4), "gathered"),
    "fsdp=4 stationary": (MeshConfig(fsdp=4), "stationary"),
    "tensor=4": (MeshConfig(tensor=4), "gathered"),
}
PARTS = ("encode", "prefill", "rollout")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--layouts-only", action="store_true", help="only the layouts of weights, on the devices there are"
    )
    options = parser.parse_args(argv)
    size = Size.of(options)
    report = Report("rollout", dataclasses.asdict(size) | {"rounds": options.rounds})
    if options.layouts_only:
        _layouts(report, size, options.rounds)
        return report.finish(options.json)
    layers = "scanned" if unrolled_on(jax.default_backend()) else "unrolled"
    cache = "bfloat16" if size.dtype == "float32" else "float32"
    ablations = {
        "early exit": lambda base: base.variant(ends_after=ENDS_AFTER).rollout,
        "prefix off": lambda base: _ungrouped(base).rollout,
        "encoder off": lambda base: _ungrouped(base).encode,
        f"layers {layers}": lambda base: base.variant(rollout_layers=layers).rollout,
        f"cache {cache}": lambda base: base.variant(rollout_cache=cache).rollout,
    }
    wanted = chosen({"rollout": None, **ablations, "layouts": None}, options.only)
    base = Workload(size)
    peak = Peak(size.dtype)
    cases = {
        "encode": base.encode,
        "prefill": lambda: base.rollout(1),
        "rollout": base.rollout,
        **{name: make(base) for name, make in ablations.items() if name in wanted},
        "matrix peak": peak.matrix,
        "stream": peak.stream,
    }
    timings = measure(cases, rounds=options.rounds)
    _parts(report, base, timings, peak)
    _ablations(report, base, timings)
    if "layouts" in wanted:
        if len(jax.devices()) >= LAYOUT_DEVICES:
            _layouts(report, size, options.rounds)
        else:
            words = [*size.options(), "--rounds", str(options.rounds), "--layouts-only"]
            report.rows += in_child("benchmarks.rollout", words, devices=LAYOUT_DEVICES)["rows"]
            report.note(f"Layouts: {LAYOUT_DEVICES} virtual devices of this machine's CPU, whatever the rest ran on.")
    return report.finish(options.json)


def _ungrouped(base: Workload) -> Workload:
    """Return the same number of completions as prompts of one sample each."""
    size = dataclasses.replace(base.size, prompts=base.size.prompts * base.size.samples, samples=1)
    return Workload(size, params=base.params)


def _parts(report: Report, base: Workload, timings: dict[str, Timing], peak: Peak) -> None:
    size, run, clip = base.size, base.run, base.clip
    rows = size.prompts * size.samples
    matrix = peak.flops_per_second(timings["matrix peak"])
    stream = peak.bytes_per_second(timings["stream"])
    whole, prefill = timings["rollout"].median, timings["prefill"].median
    steps = size.new_tokens - 1
    flops = {
        "encode": encode_flops(run, clip, size.prompts),
        "prefill": prefill_flops(run, clip, size.prompts),
    }
    for name in ("encode", "prefill"):
        least = flops[name] / matrix
        _row(report, name, timings[name], floor=least, of_floor=least / timings[name].median)
    report.row(case="decode", seconds=whole - prefill)
    _row(report, "rollout", timings["rollout"], tokens_per_second=rows * size.new_tokens / whole)
    if steps:
        moved = token_step_bytes(run, clip, size.prompts, size.samples, size.new_tokens)
        least = {
            "bytes": moved / stream,
            "FLOPs": token_step_flops(run, clip, rows, size.new_tokens) / matrix,
        }
        bound, floor = max(least.items(), key=lambda item: item[1])
        each = (whole - prefill) / steps
        report.row(case="one token of all rows", seconds=each, floor=floor, of_floor=floor / each)
        times = {name: f"{seconds * 1e6:,.0f} us" for name, seconds in least.items()}
        report.note(
            f"A token step must read {moved / 1e6:,.1f} MB (weights, live keys and values), {times['bytes']} at "
            f"{stream / 1e9:,.1f} GB/s, and compute, {times['FLOPs']} at {matrix / 1e9:,.0f} GFLOP/s; both rates are "
            f"measured here, and the floor is that of {bound}. What fits into caches is read faster."
        )
    report.note("Floors of encode and prefill are useful FLOPs over the measured matrix peak.")


def _ablations(report: Report, base: Workload, timings: dict[str, Timing]) -> None:
    size = base.size
    whole = timings["rollout"].median
    for name in timings:
        if name in PARTS or name in ("matrix peak", "stream"):
            continue
        against = timings["encode"].median if name == "encoder off" else whole
        _row(report, name, timings[name], ratio=timings[name].median / against)
    if "early exit" in timings:
        mask = np.asarray(base.variant(ends_after=ENDS_AFTER).rollout().mask)
        steps = int(mask.any(axis=(0, 1)).sum())
        report.note(
            f"early exit: {mask.sum() / mask[..., 0].size:.1f} tokens a completion, the longest {steps} of "
            f"{size.new_tokens}; ratio is against the rollout of {size.new_tokens} tokens of all."
        )
    report.note("ratio: of encoder off against encode, of the others against rollout.")


def _row(report: Report, case: str, timing: Timing, **columns: Any) -> None:
    report.row(case=case, seconds=timing.median, low=timing.low, high=timing.high, first_call=timing.first, **columns)


def _layouts(report: Report, size: Size, rounds: int) -> None:
    """Measure the rollout over meshes of four devices."""
    cases: dict[str, Callable] = {}
    for name, (mesh, weights) in LAYOUTS.items():
        cases[name] = Workload(size, mesh=mesh, rollout_weights=weights).rollout
    timings = measure(cases, rounds=rounds)
    first = next(iter(timings.values())).median
    for name, timing in timings.items():
        _row(report, name, timing, ratio=timing.median / first)


if __name__ == "__main__":
    run(main)
