"""The progress line, on a terminal and in a log, by an injected clock."""

import io

from jgrpo.runtime.progress import Progress
from jgrpo.runtime.timer import PhaseTimer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_the_first_the_last_and_one_line_every_few_seconds():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, stream=stream, every=5.0, clock=clock)
    for step in range(1, 11):
        clock.now += 2.0
        progress.update(step, {"reward": step / 10, "tokens/s": 12345.6})
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 1/10  reward 0.1  tokens/s 12,346  18s left",
        "step 4/10  reward 0.4  tokens/s 12,346  12s left",
        "step 7/10  reward 0.7  tokens/s 12,346  6s left",
        "step 10/10  reward 1  tokens/s 12,346  done in 20s",
    ]


def test_a_resumed_run_counts_the_time_left_from_where_it_began():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, done=90, stream=stream, clock=clock)
    clock.now += 30.0
    progress.update(91, {"loss": 1.5})
    assert stream.getvalue() == "step 91/100  loss 1.5  4m 30s left\n"


def test_a_terminal_gets_one_line_that_is_rewritten(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    clock, stream = Clock(), Terminal()
    progress = Progress(3, stream=stream, clock=clock)
    for step in (1, 2):
        clock.now += 1.0
        progress.update(step, {"reward": 0.5, "length": 33.25})
    progress.note("checkpoint saved")
    progress.update(3, {"reward": 0.5})
    progress.close()
    progress.close()
    clear = "\r\x1b[K"
    assert stream.getvalue() == (
        f"{clear}step 1/3  reward 0.5  length "
        f"{clear}step 2/3  reward 0.5  length "
        f"{clear}checkpoint saved\n"
        f"{clear}step 3/3  reward 0.5  done in\n"
    )


def test_phases_add_up_and_start_again():
    clock = Clock()
    timer = PhaseTimer(clock)
    for seconds in (1.0, 2.0):
        with timer("rollout"):
            clock.now += seconds
    with timer("update"):
        clock.now += 4.0
    assert timer.take() == {"rollout": 3.0, "update": 4.0}
    assert timer.take() == {}
