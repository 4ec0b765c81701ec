"""How fast weights are converted, and in how much memory.

Writes a random checkpoint of a published shape, in bfloat16 shards, then times, in this order and again:
    copy      the same files by shutil.copytree, flushed to the disk
    convert   Hugging Face -> Orbax, flushed
    export    Orbax -> Hugging Face, flushed
each in a process of its own. Seconds are counted after the imports; memory is the most that was ever resident.

Command:  python benchmarks/convert.py --model granite-speech-3.3-2b --directory DIR [--rounds 3] [--json FILE]
An 8B takes 52 GB of disk and some minutes.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from model_port.published import PUBLISHED
from model_port.weights import names, tree
from model_port.weights.hf_writer import write_hf
from model_port.weights.lazy import LazyArray

JOBS = {
    "copy": ("from shutil import copytree", "copytree({hf!r}, {out!r})"),
    "convert": ("from model_port.weights.convert import convert", "convert({hf!r}, {out!r})"),
    "export": ("from model_port.weights.convert import export", "export({orbax!r}, {out!r})"),
}
# Seconds from after the imports until everything is on the disk, and the most memory that was ever resident (Linux).
PROGRAM = """\
import os, time
{imports}
start = time.perf_counter()
{job}
os.sync()
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.perf_counter() - start, peak)
"""


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PUBLISHED), default="granite-speech-3.3-2b")
    parser.add_argument("--directory", type=Path, required=True, help="scratch directory, on the disk in question")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source, out = arguments.directory / "source", arguments.directory / "out"
    orbax = arguments.directory / "orbax"
    for directory in (source, out, orbax):
        shutil.rmtree(directory, ignore_errors=True)
    arrays = random_arrays(arguments.model)
    write_hf(source, PUBLISHED[arguments.model], arrays)
    run("convert", hf=str(source), out=str(orbax))

    seconds: dict[str, list[float]] = {job: [] for job in JOBS}
    memory = dict.fromkeys(JOBS, 0.0)
    for _ in range(arguments.rounds):
        for job in JOBS:
            os.sync()
            spent, peak = run(job, hf=str(source), orbax=str(orbax), out=str(out))
            shutil.rmtree(out)
            seconds[job].append(spent)
            memory[job] = max(memory[job], peak)

    size = sum(array.nbytes for array in arrays.values()) / 1e9
    largest = max(array.nbytes for array in arrays.values()) / 1e9
    copy = statistics.median(seconds["copy"])
    print(f"{arguments.model}, {size:.2f} GB in bfloat16, largest stacked parameter {largest:.2f} GB")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.rounds} rounds, medians\n")
    print(f"{'':10}{'seconds':>10}{'of copy':>10}{'GB/s':>8}{'peak GB':>10}{'beyond the largest':>20}")
    rows = []
    for job in JOBS:
        median = statistics.median(seconds[job])
        rows.append({"job": job, "seconds": seconds[job], "ratio": median / copy, "peak_gb": memory[job]})
        print(
            f"{job:10}{median:10.2f}{median / copy:10.2f}{size / median:8.2f}{memory[job]:10.2f}"
            f"{memory[job] - largest:20.2f}"
        )
    if arguments.json:
        report = {"model": arguments.model, "gb": size, "largest_gb": largest, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(source)
    shutil.rmtree(orbax)


def random_arrays(model: str) -> dict[str, LazyArray]:
    """Return noise of the model's shapes, made when it is written: a disk must not find it easy."""
    noise = np.random.default_rng(0).integers(0, 2**15, 2**24, dtype=np.uint16).view(ml_dtypes.bfloat16)

    def array(path: str, shape: tuple[int, ...]) -> LazyArray:
        stacked = names.BY_PATH[path].stacked
        part = shape[1:] if stacked else shape

        def layers():
            for _ in range(shape[0] if stacked else 1):
                yield lambda scratch: np.resize(noise, part)

        return LazyArray(path, shape, np.dtype(ml_dtypes.bfloat16), stacked, layers)

    return {path: array(path, shape) for path, shape in tree.shapes(PUBLISHED[model]).items()}


def run(job: str, **paths: str) -> tuple[float, float]:
    """Run a job in a process of its own; return its seconds and its peak memory in GB."""
    imports, call = JOBS[job]
    program = PROGRAM.format(imports=imports, job=call.format(**paths))
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    seconds, kilobytes = done.stdout.split()[-2:]
    return float(seconds), int(kilobytes) * 1024 / 1e9


if __name__ == "__main__":
    main()
