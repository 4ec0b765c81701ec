"""Our rollout and update against tunix's, without audio: a Llama of the decoder's shape.

    python -m benchmarks.peers.environments tunix
    python -m benchmarks.peers.against_tunix

Granite without its multipliers is Llama, so both have the same weights, and their log-probs are compared first. A
prompt is as long as a completion unless --text-tokens says otherwise. Of tunix's update only the compiled step is
measured, not what its trainer logs around it.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from benchmarks.harness import Report, arguments, measure
from benchmarks.peers.conversation import Peer
from benchmarks.peers.exchange import add_arguments, full_logprobs, judge, run, start, timing_rows
from benchmarks.peers.text import TextWorkload
from benchmarks.workload import Size
from jgrpo.programs.steps import Targets
from model_port.batch import Completions
from model_port.errors import UserError

TARGETS = {"rollout": 1.0, "update": 1.5}
BETA, LEARNING_RATE = 0.02, 1e-5
AGREEMENT = 1e-4  # of log-probs in float32
LACKING = (
    "tunix lacks a prompt computed once per group (it runs once per sample in rollout and update), log-probs without "
    "an array of all logits, any audio"
)


def main(command: list[str] | None = None) -> int:
    """Measure and print."""
    options = add_arguments(arguments(__doc__, text_tokens=64)).parse_args(command)
    return run(compare, options, environment="tunix")


def compare(options: argparse.Namespace) -> None:
    """Check, then run both sides in turns."""
    size = Size.of(options)
    workload = TextWorkload(size, beta=BETA, learning_rate=LEARNING_RATE)
    report = Report("text against tunix", {name: value for name, value in vars(size).items() if name != "seconds"})
    completions = jax.device_get(workload.rollout())
    targets = workload.targets(completions)
    with TemporaryDirectory() as name:
        directory = Path(name)
        write(workload, completions, targets, directory)
        with start("tunix", "tunix", settings(workload, directory), options) as peer:
            check(report, workload, peer, completions)
            ours = {"rollout": workload.rollout, "update": lambda: workload.update(targets)}
            theirs = {part: partial(peer.ask, do=part) for part in TARGETS}
            cases = {}
            for part in TARGETS:
                cases |= {f"our {part}": ours[part], f"tunix's {part}": theirs[part]}
            timings = measure(cases, rounds=options.rounds)
            same = theirs["rollout"]()["digest"] == theirs["rollout"]()["digest"]
    timing_rows(report, size, timings)
    report.note(f"peer: {peer.ready['versions']}, {peer.ready['devices']}")
    report.note(f"two rollouts of tunix, one after the other, sampled {'the same tokens' if same else 'other tokens'}")
    report.note(LACKING)
    for part, target in TARGETS.items():
        ratio = timings[f"tunix's {part}"].median / timings[f"our {part}"].median
        judge(report, f"{part} against tunix", ratio, target)
    report.finish(options.json)


def write(workload: TextWorkload, completions: Completions, targets: Targets, directory: Path) -> None:
    """Write the weights and what both update on."""
    workload.export_llama(directory)
    np.savez(
        directory / "inputs.npz",
        tokens=np.asarray(workload.batch.tokens),
        completions=completions.tokens,
        advantage=np.asarray(targets.advantage),
        ref_logp=np.asarray(targets.ref_logp),
    )


def settings(workload: TextWorkload, directory: Path) -> dict[str, Any]:
    """Return the settings of tunix's side."""
    size, decoder = workload.size, workload.run.model.decoder
    model = {
        "num_layers": decoder.num_hidden_layers,
        "vocab_size": decoder.vocab_size,
        "embed_dim": decoder.hidden_size,
        "hidden_dim": decoder.intermediate_size,
        "num_heads": decoder.num_attention_heads,
        "head_dim": decoder.head_dim,
        "num_kv_heads": decoder.num_key_value_heads,
        "rope_theta": int(decoder.rope_theta),
        "norm_eps": decoder.rms_norm_eps,
    }
    shared = {"samples": size.samples, "new_tokens": size.new_tokens, "dtype": size.dtype}
    return {
        "directory": str(directory),
        "model": model,
        **shared,
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
    }


def check(report: Report, workload: TextWorkload, peer: Peer, completions: Completions) -> None:
    """Compare log-probs of the same completions under the same weights.

    Raises:
        UserError: they differ.
    """
    theirs = np.array(peer.ask(do="check")["logps"], np.float32).reshape(completions.tokens.shape)
    difference = np.abs(theirs - full_logprobs(workload, workload.batch, completions)).max()
    text = f"check: tunix's log-probs differ from ours by {difference:.1e} at most"
    if difference > AGREEMENT and workload.size.dtype == "float32":
        raise UserError(f"{text}; allowed are {AGREEMENT:g}")
    report.note(text)


if __name__ == "__main__":
    sys.exit(main())
