"""How every benchmark measures and reports: cases in turns, compilation apart, one table, one JSON file."""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jgrpo.about import versions
from model_port.errors import UserError
from model_port.published import PUBLISHED

ROOT = Path(__file__).parent.parent
MODELS = ("demo", "tiny", *PUBLISHED)


@dataclass(frozen=True)
class Timing:
    """Seconds of one case.

    Attributes:
        first: the first call, compilation included.
        seconds: of every measured round.
    """

    first: float
    seconds: list[float]

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """The slowest round."""
        return max(self.seconds)


def measure(cases: dict[str, Callable[[], Any]], *, rounds: int = 5, warmup: int = 1) -> dict[str, Timing]:
    """Time the cases in turns, so that a busy machine hits all of them alike; each waits for its arrays.

    Args:
        warmup: calls of each case that are not counted, at least 1; the first of them compiles.
    """
    first, seconds = {}, {name: [] for name in cases}
    for name, case in cases.items():
        first[name] = timed(case)
        for _ in range(warmup - 1):
            timed(case)
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(timed(case))
    return {name: Timing(first[name], seconds[name]) for name in cases}


def chosen(cases: dict[str, Any], only: list[str] | None) -> dict[str, Any]:
    """Return the cases that --only names, or all of them.

    Raises:
        UserError: it names one that does not exist.
    """
    unknown = sorted(set(only or ()) - set(cases))
    if unknown:
        raise UserError(f"--only names {', '.join(unknown)}; the cases are {', '.join(cases)}")
    return {name: case for name, case in cases.items() if only is None or name in only}


def timed(case: Callable[[], Any]) -> float:
    """Return the seconds that a call takes until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(case())
    return time.perf_counter() - start


def run(main: Callable[[], Any]) -> None:
    """Run a benchmark from the command line; a mistake of the user's ends in a message and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Report:
    """One benchmark's table: rows of named columns, and notes beneath."""

    def __init__(self, name: str, settings: dict[str, Any]):
        self.name, self.settings = name, settings
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def row(self, **columns: Any) -> None:
        """Add a row; numbers are shown with four digits, None as nothing."""
        self.rows.append(columns)

    def note(self, text: str) -> None:
        """Add a line beneath the table."""
        self.notes.append(text)

    def finish(self, path: Path | str | None = None) -> dict[str, Any]:
        """Print the table and the notes; write all of it as JSON if a path is given. Return what is written."""
        content = {
            "benchmark": self.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "machine": machine(),
            "versions": versions(),
            "settings": self.settings,
            "rows": self.rows,
            "notes": self.notes,
        }
        described = {**content["machine"], **content["versions"]}
        print(f"{self.name}: " + ", ".join(f"{key} {value}" for key, value in self.settings.items()))
        print(", ".join(f"{key} {value}" for key, value in described.items()))
        print(table(self.rows))
        for note in self.notes:
            print(note)
        if path is not None:
            Path(path).write_text(json.dumps(content, indent=1) + "\n")
        return content


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as aligned columns; text to the left, numbers to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_shown(row.get(name)) for name in names] for row in rows]
    numeric = [all(not isinstance(row.get(name), str) for row in rows) for name in names]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in (names, *cells)
    ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def in_child(module: str, options: list[str], *, devices: int | None = None, **environment: str) -> dict[str, Any]:
    """Run a benchmark in a process of its own and return its figures; what it prints is not shown.

    Args:
        devices: of the CPU, virtual ones; by default the child sees what this process sees.
        environment: variables to set.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    if devices is not None:
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", module, *options, "--json", str(path)]
        done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(path.read_text())


def machine() -> dict[str, Any]:
    """Return what this process computes on."""
    devices = jax.devices()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def _cpu() -> str:
    """Return the processor's name; platform.processor() knows none on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def arguments(description: str, *, rounds: int = 5, lengths: bool = False, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share; each may add its own.

    Args:
        lengths: whether completions may have other lengths than T.
        defaults: of the shared options, where a benchmark's are others.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--rounds", type=int, default=rounds, help="times that every case is measured")
    parser.add_argument("--model", choices=MODELS, default="demo", help="whose shape the random weights have")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--prompts", type=int, default=8, help="P, prompts of a step")
    parser.add_argument("--samples", type=int, default=8, help="G, completions of a prompt")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of every clip")
    parser.add_argument("--new-tokens", type=int, default=64, help="T, tokens of a completion at most")
    parser.add_argument("--text-tokens", type=int, default=28, help="of a prompt, besides its audio")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases to measure; by default all of them")
    if lengths:
        parser.add_argument(
            "--mean-length",
            type=float,
            help="tokens of a completion on average, log-normal, one of 32 at the limit T; by default all have T",
        )
        parser.add_argument("--sharing", type=float, default=1.0, help="tokens of completions over distinct beginnings")
    parser.set_defaults(**defaults)
    return parser
