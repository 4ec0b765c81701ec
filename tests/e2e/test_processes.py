"""Two processes train as one process with the same devices does, and end when one of them is lost."""

import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Workplace, read_rows, saved_arrays, train

pytestmark = pytest.mark.distributed

STEPS = 2
OPTIONS = ("--num-steps", str(STEPS), "--completions-every", "1", "--optimiser.learning-rate", "1e-3")
HEARTBEAT = 10  # the least that is allowed
WITHIN, ACROSS = (2, 2, 2), (1, 1, 8)  # where the tensor axis lies, seen from a process with four of eight devices


def mesh_options(mesh: tuple[int, int, int]) -> tuple[str, ...]:
    names = ("data", "fsdp", "tensor")
    return tuple(part for name, size in zip(names, mesh, strict=True) for part in (f"--mesh.{name}", str(size)))


def start_both(work: Workplace, *argv: str | Path, devices: int = 4) -> list[subprocess.Popen]:
    """Start a command as two processes, which meet at a free port of this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    common = ("--distributed.coordinator-address", address, "--distributed.num-processes", "2")
    common += ("--distributed.heartbeat-timeout", str(HEARTBEAT))
    return [
        work.start(*argv, *common, "--distributed.process-id", str(process), devices=devices) for process in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for both to end well."""
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{out}\n{err}"


def timeless(run_dir: Path) -> list[dict]:
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """The same samples, bit for bit, and the same numbers in float32."""
    for ours, theirs in zip(timeless(one), timeless(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    files = [sorted(run.glob("completions/*")) for run in (one, other)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    for ours, theirs in zip(*map(lambda paths: [read_rows(path) for path in paths], files), strict=True):
        assert [row["completions"] for row in ours] == [row["completions"] for row in theirs]
    arrays = [saved_arrays(run, STEPS) for run in (one, other)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, value in arrays[1].items():
        np.testing.assert_allclose(arrays[0][name], value, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(work):
    """A run of one process with eight devices."""
    return train(work.grpo, work.root / "alone", *OPTIONS, *mesh_options(WITHIN))


@pytest.mark.parametrize("mesh", [WITHIN, ACROSS], ids=("tensor within", "tensor across"))
def test_grpo(work, alone, mesh):
    run = work.root / f"grpo_{mesh[2]}"
    finish(start_both(work, "grpo", work.grpo, "--run-dir", run, *OPTIONS, *mesh_options(mesh)))
    assert_same_run(run, alone)
