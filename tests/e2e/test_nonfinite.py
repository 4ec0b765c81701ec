"""A loss that is not finite: the update is skipped, counted, and in the end the run stops and says why."""

from jgrpo import cli
from tests.e2e.conftest import assert_same_bits, read_rows, saved_arrays

# The first update throws all parameters out of the range of float32, and every later loss is NaN.
EXPLODING = ("--optimiser.learning-rate", "3e38", "--checkpoint.every", "1", "--checkpoint.keep", "9")


def test_bad_updates_are_skipped_counted_and_end_the_run(work, capsys):
    run = work.root / "exploding"
    argv = ["grpo", str(work.grpo), "--run-dir", str(run), "--num-steps", "5", *EXPLODING]
    assert cli.main([*argv, "--max-skipped-updates", "2"]) == 2
    out, errors = capsys.readouterr()
    assert "step 2: loss nan" in out and "skipped (1 so far)" in out
    (message,) = errors.splitlines()
    assert message.startswith("error: step 4: loss nan, grad_norm ")
    assert "3 updates were skipped" in message and "max_skipped_updates is 2" in message
    rows = read_rows(run / "metrics.jsonl")
    assert [(row["step"], row["skipped"]) for row in rows] == [(1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    assert rows[3]["loss"] is None
    sound = saved_arrays(run, 1)
    for step in (2, 3, 4):
        assert_same_bits(saved_arrays(run, step), sound)

    # The count goes on over a resume, and the limit may be raised.
    assert cli.main([*argv, "--max-skipped-updates", "3"]) == 2
    assert "error: step 5: " in capsys.readouterr().err
