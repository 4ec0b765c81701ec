"""How the cost grows: with prompts, G, audio seconds and completion length over a 16-fold range, and with devices.

    python -m benchmarks.scale
    python -m benchmarks.scale --model granite-speech-3.3-2b --dtype bfloat16 --prompts 8 --json scale.json

From a base size one number at a time is a quarter and four times its value. The exponent is that of the power law that
fits best: 1 is linear, less means that what does not grow still counts, more than 1 would be worse than linear. Then
the same step is laid out over 1, 2, 4 and 8 devices of the data axis. Where there are fewer, these are virtual ones of
the CPU: all of them share its cores, so that shows what the layout adds to the work, and not a speed-up.
"""

import dataclasses
from typing import Any

import jax

from benchmarks.floors import fitted_exponent
from benchmarks.harness import Report, arguments, chosen, in_child, measure
from benchmarks.workload import Size, Workload
from model_port.partition import MeshConfig

FACTORS = (0.25, 1, 4)
NUMBERS = ("prompts", "samples", "seconds", "new_tokens")
DEVICES = (1, 2, 4, 8)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    parser = arguments(__doc__, prompts=4, rounds=3)
    parser.add_argument("--device-counts", type=int, nargs="*", default=list(DEVICES), help="sizes of the data axis")
    parser.add_argument("--data-axis", type=int, help="only measure the base size over so many devices")
    options = parser.parse_args(argv)
    size = Size.of(options)
    report = Report("scale", dataclasses.asdict(size) | {"rounds": options.rounds})
    if options.data_axis:
        _over_devices(report, size, options.data_axis, options.rounds)
        return report.finish(options.json)
    numbers = chosen(dict.fromkeys(NUMBERS), options.only)
    if numbers:
        _sizes(report, size, list(numbers), options.rounds)
    for count in options.device_counts:
        wide = dataclasses.replace(size, prompts=max(size.prompts, max(options.device_counts)))
        if count <= len(jax.devices()) and jax.default_backend() != "cpu":
            _over_devices(report, wide, count, options.rounds)
        else:
            words = [*_words(wide), "--rounds", str(options.rounds), "--data-axis", str(count)]
            report.rows += in_child("benchmarks.scale", words, devices=count)["rows"]
    return report.finish(options.json)


def _sizes(report: Report, base: Size, names: list[str], rounds: int) -> None:
    sizes = {(name, factor): _times(base, name, factor) for name in names for factor in FACTORS}
    cases = {}
    for size in dict.fromkeys(sizes.values()):
        work = Workload(size)
        targets = work.targets(work.rollout())
        cases[size, "encode"] = work.encode
        cases[size, "rollout"] = work.rollout
        cases[size, "update"] = lambda work=work, targets=targets: work.update(targets)
    timings = measure(cases, rounds=rounds)
    for name in names:
        own = [sizes[name, factor] for factor in FACTORS]
        for program in ("encode", "rollout", "update"):
            seconds = [timings[size, program].median for size in own]
            at = [getattr(size, name) for size in own]
            report.row(
                case=f"{name} {', '.join(f'{value:g}' for value in at)}",
                program=program,
                **dict(zip(("at_quarter", "at_base", "at_4_times"), seconds, strict=True)),
                exponent=fitted_exponent(at, seconds),
                last_exponent=fitted_exponent(at[1:], seconds[1:]),
            )
    report.note("last_exponent: from the base to four times it.")


def _times(size: Size, name: str, factor: float) -> Size:
    value = getattr(size, name)
    changed = type(value)(factor * value)
    return dataclasses.replace(size, **{name: changed})


def _words(size: Size) -> list[str]:
    fields = [(f"--{name.replace('_', '-')}", str(value)) for name, value in dataclasses.asdict(size).items()]
    return [part for field in fields for part in field]


def _over_devices(report: Report, size: Size, count: int, rounds: int) -> None:
    work = Workload(size, mesh=MeshConfig(data=count))
    targets = work.targets(work.rollout())
    cases = {"encode": work.encode, "rollout": work.rollout, "update": lambda: work.update(targets)}
    for program, timing in measure(cases, rounds=rounds).items():
        report.row(case=f"data={count}", program=program, seconds=timing.median, low=timing.low, high=timing.high)


if __name__ == "__main__":
    main()
