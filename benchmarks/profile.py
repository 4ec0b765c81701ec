"""Where the time of a step's programs goes: seconds by kind of operation, as the profiler saw them.

    python -m benchmarks.profile
    python -m benchmarks.profile --model granite-speech-3.3-2b --dtype bfloat16 --json profile.json     # GPU or TPU

Every operation of the compiled program counts with what it was made of: a fusion with the first of these kinds that it
holds. `products` are matrix products (and fusions with one), `random` numbers for sampling, `gathers` lookups, scatters
and writes into part of an array, `copies` data that is moved or turned round, `reductions` sums, maxima and sorts,
`elementwise` arithmetic on every element, `other` the rest. `busy` is the time that operations of one device add up to,
which may be more than `seconds` where several run at a time; `share` is of busy.
"""

import collections
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks.harness import Report, arguments, chosen, measure, run
from benchmarks.workload import Size, Workload, planned_calls
from jgrpo.planning.hlo import Instruction, Module
from jgrpo.planning.measure import compile_call

# In the order in which they name a fusion.
KINDS = {
    "products": ("dot", "convolution"),
    "random": ("rng-bit-generator", "xor", "shift-right-logical"),
    "gathers": ("gather", "scatter", "dynamic-update-slice"),
    "reductions": ("reduce", "reduce-window", "sort"),
    "elementwise": (
        "exponential",
        "multiply",
        "add",
        "subtract",
        "divide",
        "compare",
        "select",
        "rsqrt",
        "convert",
        "and",
    ),
    "copies": ("copy", "transpose", "concatenate", "pad", "slice", "dynamic-slice", "broadcast", "iota", "reshape"),
}
LIBRARIES = {"matmul": "products", "gemm": "products"}  # of custom calls, by a part of their target
CONTROL = ("while", "call", "conditional", "tuple", "get-tuple-element", "parameter", "constant", "bitcast")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    options = arguments(__doc__, rounds=3).parse_args(argv)
    size = Size.of(options)
    report = Report("profile", dataclasses.asdict(size) | {"rounds": options.rounds})
    work = Workload(size)
    targets = work.targets(work.completions())
    cases = {
        "encode": work.encode,
        "rollout": work.rollout,
        "score": lambda: work.score(targets.trees),
        "update": lambda: work.update(targets),
    }
    abstract, calls = planned_calls(size)
    for name, case in chosen(cases, options.only).items():
        seconds = measure({name: case}, rounds=options.rounds)[name].median
        kinds = kinds_of(Module(compile_call(calls[name], abstract.mesh).text))
        spent = by_kind(profiled(case, options.rounds), kinds)
        busy = sum(spent.values())
        for kind, value in sorted(spent.items(), key=lambda item: -item[1]):
            report.row(case=name, kind=kind, share=value / busy, busy=value / options.rounds, seconds=seconds)
    return report.finish(options.json)


def kinds_of(module: Module) -> dict[str, str]:
    """Return the kind of every operation that a program runs, by its name; loops and calls are none themselves."""
    found = {}
    for part in module.computations.values():
        for each in part.values():
            if each.operation not in CONTROL:
                found[each.name] = _kind(module, each)
    return found


def _kind(module: Module, each: Instruction) -> str:
    operations = {inner.operation for inner in module.computations.get(each.attribute("calls"), {}).values()}
    operations |= {each.operation} - {"fusion"}
    for word, kind in LIBRARIES.items():
        if each.operation == "custom-call" and word in each.rest:
            return kind
    return next((kind for kind, names in KINDS.items() if operations & set(names)), "other")


def profiled(case: Callable[[], Any], rounds: int) -> Iterator[tuple[str, float]]:
    """Yield the name and the seconds of every event of the profile that so many calls leave."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                jax.block_until_ready(case())
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    yield event.name, event.duration_ns / 1e9


def by_kind(events: Iterator[tuple[str, float]], kinds: dict[str, str]) -> dict[str, float]:
    """Add the seconds of a program's operations up by their kind; other events do not count."""
    spent: dict[str, float] = collections.defaultdict(float)
    for name, seconds in events:
        name = re.sub(r"^%|\s.*$", "", name)
        if name in kinds:
            spent[kinds[name]] += seconds
    return dict(spent)


if __name__ == "__main__":
    run(main)
