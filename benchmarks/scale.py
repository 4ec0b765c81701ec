"""How the cost grows: with prompts, G, audio seconds and completion length over a 16-fold range, and with devices.

    python -m benchmarks.scale
    python -m benchmarks.scale --model granite-speech-3.3-2b --dtype bfloat16 --prompts 8 --json scale.json

From a base size one number at a time is made a quarter and four times as large. `limit` is T once more, where one of
eight tokens ends a completion: the same short completions under limits from half of the base's T to eight times that.
The exponent is that of the power law that fits best: 1 is linear, less means that what does not grow still counts, and
more than 1 would be worse than linear. An update of more prompts than the base is measured in one piece, and in
micro-batches of as many as the base has. Then the same step is laid out over 1, 2, 4 and 8 devices of the data axis.
Where there are fewer, these are virtual ones of the CPU: all of them share its cores, so that shows what the layout
adds to the work, and not a speed-up.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.floors import fitted_exponent
from benchmarks.harness import Report, arguments, chosen, in_child, measure, run
from benchmarks.workload import Size, Workload
from model_port.partition import MeshConfig

NUMBERS = ("prompts", "samples", "seconds", "new_tokens", "limit")
ENDS_AFTER, LIMIT_FACTOR = 8, 2  # a completion has some 8 tokens, and the limit is at least half of the base's T
DEVICES = (1, 2, 4, 8)
FIELD = {"limit": "new_tokens"}  # of a size, where it has another name
PROGRAMS = ("encode", "rollout", "update")
PIECES = "update in micro-batches"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    parser = arguments(__doc__, prompts=4, rounds=3, lengths=True)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 1, 4], help="of each number, rising")
    parser.add_argument("--device-counts", type=int, nargs="*", default=list(DEVICES), help="sizes of the data axis")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="to measure")
    parser.add_argument("--data-axis", type=int, help="only measure the base size over so many devices")
    options = parser.parse_args(argv)
    size = Size.of(options)
    report = Report("scale", dataclasses.asdict(size) | {"rounds": options.rounds})
    if options.data_axis:
        _over_devices(report, size, options.data_axis, options)
        return report.finish(options.json)
    numbers = chosen(dict.fromkeys(NUMBERS), options.only)
    if numbers:
        _sizes(report, size, list(numbers), options)
    for count in options.device_counts:
        wide = dataclasses.replace(size, prompts=max(size.prompts, max(options.device_counts)))
        if count <= len(jax.devices()) and jax.default_backend() != "cpu":
            _over_devices(report, wide, count, options)
        else:
            words = [*wide.options(), "--rounds", str(options.rounds), "--data-axis", str(count)]
            words += ["--programs", *options.programs]
            report.rows += in_child("benchmarks.scale", words, devices=count)["rows"]
    return report.finish(options.json)


def _sizes(report: Report, base: Size, names: list[str], options: argparse.Namespace) -> None:
    factors = options.factors
    sizes = {(name, factor): _times(base, name, factor) for name in names for factor in factors}
    cases = {}
    split = [PIECES] if "update" in options.programs else []
    programs = {name: [*options.programs, *(split if name == "prompts" else [])] for name in names}
    for (name, _), size in sizes.items():
        early = ENDS_AFTER if name == "limit" else None
        missing = [program for program in programs[name] if (size, early, program) not in cases]
        pieces = max(1, size.prompts // base.prompts)
        found = _programs(size, missing, pieces=pieces, ends_after=early) if missing else {}
        cases |= {(size, early, program): case for program, case in found.items()}
    timings = measure(cases, rounds=options.rounds)
    for name in names:
        own = [sizes[name, factor] for factor in factors]
        for program in programs[name]:
            early = ENDS_AFTER if name == "limit" else None
            seconds = [timings[size, early, program].median for size in own]
            at = [getattr(size, FIELD.get(name, name)) for size in own]
            report.row(
                case=f"{name} {', '.join(f'{value:g}' for value in at)}",
                program=program,
                **{f"x{factor:g}": value for factor, value in zip(factors, seconds, strict=True)},
                exponent=fitted_exponent(at, seconds),
                last_exponent=fitted_exponent(at[-2:], seconds[-2:]),
            )
    report.note("last_exponent: of the two largest sizes alone.")


def _times(size: Size, name: str, factor: float) -> Size:
    if name == "limit":
        name, factor = "new_tokens", LIMIT_FACTOR * factor
    elif name == "new_tokens" and size.mean_length is not None:
        size = dataclasses.replace(size, mean_length=factor * size.mean_length)
    value = getattr(size, name)
    changed = type(value)(factor * value)
    return dataclasses.replace(size, **{name: changed})


def _programs(size: Size, names: list[str], *, pieces: int = 1, **options: Any) -> dict[str, Callable[[], Any]]:
    """Return what to measure at a size, of the programs that are asked for; PIECES is in so many micro-batches."""
    work = Workload(size, **options)
    cases = {"encode": work.encode, "rollout": work.rollout}
    if "update" in names or PIECES in names:
        targets = work.targets(work.completions())
        cases["update"] = lambda: work.update(targets)
    if PIECES in names:
        split = work.variant(micro_batches=pieces)
        cases[PIECES] = lambda: split.update(targets)
    return {name: cases[name] for name in names}


def _over_devices(report: Report, size: Size, count: int, options: argparse.Namespace) -> None:
    cases = _programs(size, options.programs, mesh=MeshConfig(data=count))
    for program, timing in measure(cases, rounds=options.rounds).items():
        report.row(case=f"data={count}", program=program, seconds=timing.median, low=timing.low, high=timing.high)


if __name__ == "__main__":
    run(main)
