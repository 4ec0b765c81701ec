"""Killed twenty times at random moments, a run loses little each time and ends like one that was not killed.

`python -m pytest -m slow tests/e2e/test_kills.py`, some minutes.
"""

import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import assert_same_bits, read_rows, saved_arrays, train

KILLS, STEPS, EVERY = 20, 400, 4
OPTIONS = ("--num-steps", str(STEPS), "--checkpoint.every", str(EVERY))


def count_lines(metrics: Path) -> int:
    """Return how many steps are logged; a torn line is none."""
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.slow
def test_twenty_kills_at_random_moments(work):
    """At most one interval of finished steps is done again, whether a checkpoint was being written or not."""
    undisturbed, run = (train(work.sft, work.root / "undisturbed", *OPTIONS), work.root / "killed")
    moments, metrics = random.Random(0), run / "metrics.jsonl"
    kills = while_saving = 0
    logged = [0]
    while kills < KILLS:
        process = work.start("sft", work.sft, "--run-dir", run, *OPTIONS)
        fewest = count_lines(metrics)  # a run that goes on first drops those after its checkpoint
        further = moments.randint(1, 3 * EVERY)
        while (lines := count_lines(metrics)) < fewest + further:
            assert process.poll() is None, process.communicate()
            fewest = min(fewest, lines)
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        out, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        resumed = re.search(r"goes on after step (\d+)\n", out)
        assert logged[-1] - (int(resumed[1]) if resumed else 0) <= EVERY
        logged.append(count_lines(metrics))
        kills += 1
        while_saving += bool(list((run / "checkpoints").glob("*tmp*")))
    assert logged[-1] < STEPS and while_saving > 1
    train(work.sft, run, *OPTIONS)
    assert_same_bits(saved_arrays(run, STEPS), saved_arrays(undisturbed, STEPS))
    rows = [
        [
            {name: value for name, value in row.items() if "second" not in name}
            for row in read_rows(one / "metrics.jsonl")
        ]
        for one in (run, undisturbed)
    ]
    assert rows[0] == rows[1]
