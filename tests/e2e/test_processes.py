"""Two processes train as one process with the same devices does, and end when one of them is lost.

The tests marked slow are those with eight devices and those that wait for a lost process:
`python -m pytest -m slow tests/e2e/test_processes.py`.
"""

import functools
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from jgrpo.runtime.checkpoint import saved_steps
from tests.e2e.conftest import Workplace, read_rows, saved_arrays, train

pytestmark = pytest.mark.distributed

STEPS = 2
OPTIONS = ("--num-steps", str(STEPS), "--completions-every", "1", "--optimiser.learning-rate", "1e-3")
HEARTBEAT = 10  # seconds; the least that is allowed
FEW = [((1, 2, 1), 1), ((1, 1, 2), 1)]  # mesh and devices of a process: prompts, or heads, on both sides
MANY = [((2, 2, 2), 4), ((1, 1, 8), 4)]  # the tensor axis within a process, and across


def mesh_options(mesh: tuple[int, int, int]) -> tuple[str, ...]:
    """Return the options of a mesh."""
    sizes = zip(("data", "fsdp", "tensor"), map(str, mesh), strict=True)
    return tuple(part for name, size in sizes for part in (f"--mesh.{name}", size))


def start_both(work: Workplace, *argv: str | Path, devices: int, before: str = "") -> list[subprocess.Popen]:
    """Start a command as two processes, which meet at a free port of this machine; `before` is run in the second."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    common = ("--distributed.coordinator-address", address, "--distributed.num-processes", "2")
    common += ("--distributed.heartbeat-timeout", str(HEARTBEAT), "--distributed.start-timeout", "120")
    return [
        work.start(*argv, *common, "--distributed.process-id", str(process), devices=devices, before=code)
        for process, code in enumerate(("", before))
    ]


def train_both(
    work: Workplace, method: str, run: Path, mesh: tuple[int, int, int], devices: int, *options: str
) -> Path:
    """Train as two processes to the end."""
    config = work.grpo if method == "grpo" else work.sft
    command = (method, config, "--run-dir", run, *OPTIONS, *mesh_options(mesh), *options)
    for process in start_both(work, *command, devices=devices):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{out}\n{err}"
    return run


def timeless(run: Path) -> list[dict]:
    """Read metrics without times."""
    rows = read_rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """The same samples to the letter, and the same losses and parameters as far as float32 goes."""
    for ours, theirs in zip(timeless(one), timeless(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    files = [sorted((run / "completions").iterdir()) for run in (one, other)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    for ours, theirs in zip(*([read_rows(path) for path in paths] for paths in files), strict=True):
        assert [row["completions"] for row in ours] == [row["completions"] for row in theirs]
    arrays, expected = saved_arrays(one, STEPS), saved_arrays(other, STEPS)
    assert arrays.keys() == expected.keys()
    # A key bias adds the same to all scores of a query: its gradient is rounding, of which AdamW makes whole steps.
    for name, value in expected.items():
        if name.endswith("key.bias"):
            continue
        np.testing.assert_allclose(arrays[name], value, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(work):
    """Runs of one process with one device, by method."""
    configs = {"grpo": work.grpo, "sft": work.sft}
    return functools.cache(lambda method: train(configs[method], work.root / f"alone_{method}", *OPTIONS))


@pytest.mark.parametrize(
    ("method", "layout"), [("grpo", FEW[0]), pytest.param("sft", FEW[1], marks=pytest.mark.slow)], ids=str
)
def test_two_processes_train_as_one(work, alone, method, layout):
    run = train_both(work, method, work.root / f"two_{method}", *layout)
    assert_same_run(run, alone(method))
    assert (run / "policy" / "model_port.json").exists()
    names = {path.name for path in (run / "completions").iterdir()}
    assert names == ({f"step_{step:06d}.jsonl" for step in (1, 2)} if method == "grpo" else set())


@pytest.mark.slow
@pytest.mark.parametrize("layout", MANY, ids=str)
@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_two_processes_with_eight_devices_train_as_one(work, alone, method, layout):
    run = train_both(work, method, work.root / f"eight_{method}_{layout[0][2]}", *layout)
    assert_same_run(run, alone(method))


# Sends a signal to its own process when that writes the metrics of a step.
SIGNAL = """
import os, signal
from jgrpo.runtime.metrics import MetricsWriter
def write(self, number, metrics):
    if number == {step}:
        os.kill(os.getpid(), signal.{name})
MetricsWriter.write = write
"""
ONE = ((1, 1, 1), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "processes"),
    [(FEW[0], ONE, 1), (FEW[0], FEW[0], 2), (MANY[0], ((4, 1, 1), 4), 1), (MANY[0], ((1, 2, 2), 2), 2)],
    ids=str,
)
def test_a_run_that_lost_a_process_ends_with_a_message_and_goes_on(work, alone, before, after, processes, tmp_path):
    """The second process dies in its second step; one process or two go on from the first, on the same mesh or not."""
    mesh, devices = before
    run = tmp_path / "lost"
    command = ("grpo", work.grpo, "--run-dir", run, *OPTIONS, "--checkpoint.every", "1")
    dies = SIGNAL.format(step=2, name="SIGKILL")
    first, second = start_both(work, *command, *mesh_options(mesh), devices=devices, before=dies)
    second.communicate(timeout=240)
    assert second.returncode == -signal.SIGKILL
    died = time.monotonic()
    _, err = first.communicate(timeout=240)
    assert first.returncode not in (0, 2) and time.monotonic() - died < HEARTBEAT + 20
    # Found by a collective that fails, or by the missing heartbeat: then the words are JAX's.
    assert re.search("error: another process of this run is gone|another task died", err), err
    if processes == 2:
        train_both(work, "grpo", run, *after, "--checkpoint.every", "1")
    else:
        train(work.grpo, run, *OPTIONS, "--checkpoint.every", "1", *mesh_options(after[0]))
    assert_same_run(run, alone("grpo"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout"), [("grpo", FEW[0]), ("sft", MANY[1])], ids=str)
def test_sigterm_to_one_process_stops_both_at_one_step(work, alone, method, layout, tmp_path):
    """The second process is told to end in the first step: both save that one, end with 143, and go on from it."""
    mesh, devices = layout
    run = tmp_path / "stopped"
    command = (method, {"grpo": work.grpo, "sft": work.sft}[method], "--run-dir", run, *OPTIONS, *mesh_options(mesh))
    ends = SIGNAL.format(step=1, name="SIGTERM")
    for process in start_both(work, *command, devices=devices, before=ends):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 128 + signal.SIGTERM, err
        assert "stopped after step 1, which is saved" in err and "Traceback" not in err
    assert saved_steps(run / "checkpoints") == [1]
    train_both(work, method, run, mesh, devices)
    assert_same_run(run, alone(method))


@pytest.mark.slow
def test_what_differs_and_who_is_missing_is_said_at_the_start(work):
    command = ("grpo", work.grpo, "--run-dir", work.root / "differ", *mesh_options(FEW[0][0]))
    change = "import jgrpo.config\njgrpo.config.RunConfig.__dataclass_fields__['seed'].default = 0"
    processes = start_both(work, *command, devices=1, before="import sys\nsys.argv += ['--seed', '5']\n" + change)
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "the processes of this run are not alike" in err
        assert "process 1: config seed is '5', process 0 has '0'" in err
    options = ("--distributed.coordinator-address", "127.0.0.1:1", "--distributed.num-processes", "2")
    late = work.start(*command, *options, "--distributed.process-id", "1", "--distributed.start-timeout", "3")
    _, err = late.communicate(timeout=60)
    assert late.returncode == 3 and "error: after 3 s not all processes of this run have met" in err


def test_options_that_do_not_name_the_others(work, capsys):
    from jgrpo import cli

    for options, message in (
        (("--distributed.num-processes", "2"), "give --distributed.coordinator-address, --distributed.process-id"),
        (("--distributed.coordinator-address", "here"), "give --distributed.num-processes"),
    ):
        assert cli.main(["grpo", str(work.grpo), *options]) == 2
        assert message in capsys.readouterr().err
    whole = ("--distributed.num-processes", "2", "--distributed.process-id", "2", "--distributed.coordinator-address")
    assert cli.main(["grpo", str(work.grpo), *whole, "host:1"]) == 2
    assert "process ids are 0 to num_processes - 1" in capsys.readouterr().err
    assert cli.main(["grpo", str(work.grpo), *whole, "host"]) == 2
    assert "'host'; give HOST:PORT" in capsys.readouterr().err
