"""Compilation: seconds against layers, how many there are against buckets, and a second start from a cache.

    python -m benchmarks.compile
    python -m benchmarks.compile --model granite-speech-3.3-2b --dtype bfloat16 --json compile.json     # GPU or TPU

Layers are scanned, so `layers` should not cost more with more of them. `buckets` counts what two runs of
jgrpo.train_grpo ask of the compiler, whose clips fall into one and into two buckets of length. `start` is the time that
two processes, one after the other, take until their first step is done: both with JAX_COMPILATION_CACHE_DIR set to the
same directory, which is empty at first.
"""

import argparse
import collections
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from benchmarks.harness import Report, arguments, chosen, in_child, run
from benchmarks.training import training
from benchmarks.workload import Size, Workload, planned_calls
from jgrpo.planning.measure import compile_call

PROGRAMS = ("encode", "rollout", "score", "update")
COMPILED = "/jax/core/compile/backend_compile_duration"
LOADED = "/jax/compilation_cache/cache_hits"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    parser = arguments(__doc__, prompts=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32], help="of the decoder")
    parser.add_argument("--first-step", action="store_true", help="only start and take one step: what a child does")
    options = parser.parse_args(argv)
    size = Size.of(options)
    report = Report("compile", dataclasses.asdict(size))
    if options.first_step:
        _first_step(report, size)
        return report.finish(options.json)
    parts = {"layers": _layers, "buckets": _buckets, "start": _start}
    for part in chosen(parts, options.only).values():
        part(report, size, options)
    return report.finish(options.json)


def _layers(report: Report, size: Size, options: argparse.Namespace) -> None:
    for layers in options.layers:
        run, calls = planned_calls(size, decoder={"num_hidden_layers": layers})
        for name in ("rollout", "update"):
            report.row(case=f"{layers} layers, {name}", seconds=compile_call(calls[name], run.mesh).seconds)


def _buckets(report: Report, size: Size, options: argparse.Namespace) -> None:
    for lengths in ((size.seconds,), (size.seconds / 2, size.seconds)):
        with training(size, lengths=lengths) as work, compilations() as count:
            steps = work.steps(8)
        programs = {name: count[f"jit({name})"] + count[name] for name in PROGRAMS}
        report.row(
            case=f"{len(lengths)} bucket{'s' if len(lengths) > 1 else ''}, {len(steps)} steps",
            compilations=sum(programs.values()),
            small_ones=sum(count.values()) - sum(programs.values()),
        )
        report.note(
            f"{len(lengths)} of length: " + ", ".join(f"{name} {number}" for name, number in programs.items()) + "."
        )


def _start(report: Report, size: Size, options: argparse.Namespace) -> None:
    words = [*size.options(), "--first-step"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for case in ("start, empty cache", "start, full cache"):
            (row,) = in_child("benchmarks.compile", words, **environment)["rows"]
            report.row(**{**row, "case": case})


def _first_step(report: Report, size: Size) -> None:
    """Make a workload and take a step, from nothing."""
    loaded = []
    jax.monitoring.register_event_listener(lambda event, **_: loaded.append(event) if event == LOADED else None)
    start = time.perf_counter()
    with compilations() as count:
        work = Workload(size)
        targets = work.targets(work.completions())
        jax.block_until_ready((work.score(targets.trees), work.update(targets)))
    seconds = time.perf_counter() - start
    report.row(case="start", seconds=seconds, compilations=sum(count.values()), from_cache=len(loaded))


@contextmanager
def compilations() -> Iterator[collections.Counter]:
    """Yield a counter of what the compiler is asked for meanwhile, by the name of the program."""
    count: collections.Counter = collections.Counter()

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event == COMPILED:
            count[about.get("fun_name", "")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


if __name__ == "__main__":
    run(main)
