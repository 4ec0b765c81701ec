"""A whole GRPO step, as `jgrpo grpo` runs it, and where its time goes.

    python -m benchmarks.step
    python -m benchmarks.step --new-tokens 200 --mean-length 25 --sharing 2
    python -m benchmarks.step --model granite-speech-3.3-2b --dtype bfloat16 --json step.json           # GPU or TPU

Each case is a run of jgrpo.train_grpo on exported random weights: grain reads and transforms the clips, BLEU is
computed on the host, every completion has exactly T tokens, or a length about a mean. Seconds are medians over steps
of runs in turns: `data` is the wait for the next batch, `reward` turning tokens into text, `reward_wait` what is left
of BLEU when the device is done with the reference's log-probs (`score`), `rest` what no phase counts.
"""

import dataclasses
from typing import Any

from benchmarks.harness import Report, arguments, chosen, run
from benchmarks.training import in_turns, medians, training
from benchmarks.workload import Size, completion_shapes

CASES = {
    "step": {},
    "encoder cached": {"data": {"cache_encoder": True}},
    "features cached": {"data": {"cache_features": True}},
    "beta 0": {"grpo": {"beta": 0.0}},
    "remat full": {"model": {"remat": "full"}},
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    parser = arguments(__doc__, rounds=2, lengths=True)
    parser.add_argument("--steps", type=int, default=6, help="of every run that are measured, after two that are not")
    options = parser.parse_args(argv)
    size = Size.of(options)
    cases = {"step": {}, **chosen(CASES, options.only)}
    report = Report("step", dataclasses.asdict(size) | {"rounds": options.rounds, "steps": options.steps})
    with training(size) as work:
        found = in_turns(work, cases, rounds=options.rounds, steps=options.steps)
    tokens = int(completion_shapes(size)[0].sum())
    whole = medians(found["step"])["step"]
    for name, steps in found.items():
        if {step["num_tokens"] for step in steps} != {tokens}:
            raise RuntimeError(f"a step sampled {steps[0]['num_tokens']} tokens and not {tokens}")
        parts = medians(steps)
        seconds = [step["seconds"] for step in steps]
        spread = {"low": min(seconds), "high": max(seconds)}
        samples = size.prompts * size.samples / parts["step"]
        report.row(case=name, **parts, **spread, samples_per_second=samples, ratio=parts["step"] / whole)
    shape = {(step["tree/trees"], step["tree/slots"]) for step in found["step"]}
    report.note("trees x slots of a group: " + ", ".join(f"{trees} x {slots}" for trees, slots in sorted(shape)) + ".")
    return report.finish(options.json)


if __name__ == "__main__":
    run(main)
