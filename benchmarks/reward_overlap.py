"""How long the device waits for rewards in a step with BLEU, with rollout chunks and without.

    python -m benchmarks.reward_overlap
    python -m benchmarks.reward_overlap --model granite-speech-3.3-2b --dtype bfloat16 --json reward_overlap.json

Runs of jgrpo.train_grpo, as in benchmarks.step. Two figures for a step: `waiting` is what the trainer's own clock says
at most (turning the last chunk's tokens into text, and the wait for BLEU that follows the reference's log-probs; the
earlier chunks' texts are made while the device samples); `against_length` is the step's time over that of a step whose
reward compares the numbers of words, which costs next to nothing.
"""

import dataclasses
import statistics
from typing import Any

from benchmarks.harness import Report, arguments, chosen, run
from benchmarks.training import in_turns, medians, training
from benchmarks.workload import Size

CHUNKS = (1, 2, 4)
FREE = "length"  # a reward that costs next to nothing


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=8, help="of every run that are measured, after two that are not")
    options = parser.parse_args(argv)
    size = Size.of(options)
    every = {f"{count} chunk{'s' if count > 1 else ''}": count for count in CHUNKS if size.prompts % count == 0}
    wanted = chosen(every, options.only)
    report = Report("reward_overlap", dataclasses.asdict(size) | {"rounds": options.rounds, "steps": options.steps})
    cases = {}
    for name, count in wanted.items():
        cases[name] = {"grpo": {"rollout_chunks": count}}
        cases[f"{name}, {FREE}"] = {"grpo": {"rollout_chunks": count, "reward": (FREE,)}}
    with training(size) as work:
        found = in_turns(work, cases, rounds=options.rounds, steps=options.steps)
    for name, count in wanted.items():
        steps, free = found[name], medians(found[f"{name}, {FREE}"])
        parts = medians(steps)
        waits = [step["seconds/reward"] / count + step["seconds/reward_wait"] for step in steps]
        waiting = statistics.median(waits)
        report.row(
            case=name,
            step=parts["step"],
            rollout=parts["rollout"],
            reward=parts["reward"],
            score=parts["score"],
            reward_wait=parts["reward_wait"],
            waiting=waiting,
            idle_share=waiting / parts["step"],
            against_length=parts["step"] / free["step"],
        )
    return report.finish(options.json)


if __name__ == "__main__":
    run(main)
