"""Our rollout against transformers' `generate` with num_return_sequences, on the same Granite Speech.

    python -m benchmarks.peers.environments trl
    python -m benchmarks.peers.against_generate

Same weights and features, temperature 1, nothing truncated, every completion of exactly T tokens. The two work in
turns, each in a process of its own. Ours includes the audio encoder, as `generate` does.
"""

import argparse
import sys

from benchmarks.harness import Report, arguments, measure
from benchmarks.peers.exchange import add_arguments, exported, judge, run, start, timing_rows, torch_settings
from benchmarks.workload import Size, Workload

TARGET = 2.0
LACKING = (
    "generate lacks: log-probs of what it sampled (ours are in the result), a prompt computed once per group (it runs "
    "encoder and prompt once per sample), a loop on the device"
)


def main(command: list[str] | None = None) -> int:
    """Measure and print."""
    parser = add_arguments(arguments(__doc__))
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="of transformers' decoder")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="static", help="of transformers' decoder")
    options = parser.parse_args(command)
    return run(compare, options, environment="trl")


def compare(options: argparse.Namespace) -> None:
    """Run both sides in turns."""
    size = Size.of(options)
    workload = Workload(size)
    settings = {"attention": options.attention, "cache": options.cache}
    report = Report("rollout against generate", {**vars(size), **settings})

    def ours():
        workload.encoded = workload.encode()
        return workload.rollout()

    with exported(workload) as directory:
        with start("generate", "trl", torch_settings(workload, directory, **settings), options) as peer:
            timings = measure(
                {"ours": ours, "generate": lambda: peer.ask(do="rollout")["seconds"]}, rounds=options.rounds
            )
    timing_rows(report, size, timings)
    report.note(f"peer: {peer.ready['versions']}, {peer.ready['threads']} threads")
    report.note(LACKING)
    judge(report, "rollout against generate", timings["generate"].median / timings["ours"].median, TARGET)
    report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
