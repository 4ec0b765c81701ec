"""Our whole GRPO step against TRL's GRPOTrainer, on the same Granite Speech with its audio.

    python -m benchmarks.peers.environments trl
    python -m benchmarks.peers.against_trl
    python -m benchmarks.peers.against_trl --new-tokens 200 --mean-length 25

A step is: encode, sample G completions of T tokens for each of P prompts, turn them into text, score them by the same
trivial reward, log-probs under the frozen reference (beta 0.02), loss, gradient and AdamW for projector and decoder.
Features are made ahead of time on both sides. TRL's trainer is a subclass that gives its loss the audio (side_trl.py);
first it is checked that every gradient forward pass hears it and that its log-probs are ours. With a mean length both
sides cut what they have sampled to the same lengths, one of 32 at the limit, and copy the same share of beginnings.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Report, arguments, measure
from benchmarks.peers.conversation import Peer
from benchmarks.peers.exchange import (
    add_arguments,
    exported,
    full_logprobs,
    judge,
    run,
    start,
    timing_rows,
    torch_settings,
)
from benchmarks.workload import Size, Workload, completion_shapes
from jgrpo.config import OptimiserOptions
from jgrpo.programs.steps import Targets
from jgrpo.rollout.scoring import advantages
from jgrpo.runtime.rows import place
from model_port.batch import Completions
from model_port.errors import UserError
from model_port.params import Params
from model_port.processor import Processor

STEP_TARGET, BETA, LEARNING_RATE = 3.0, 0.02, 1e-5
AGREEMENT = 1e-4  # of log-probs in float32
LACKING = (
    "TRL lacks audio in the loss without the subclass, a prompt computed once per group (encoder and prompt run once "
    "per sample and phase), logits scaled alike in sampling and loss without a hook; vLLM, its fast sampler, was "
    "not at hand"
)


def main(command: list[str] | None = None) -> int:
    """Measure and print."""
    parser = add_arguments(arguments(__doc__, lengths=True))
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="of transformers' decoder")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="of transformers' decoder")
    parser.add_argument("--micro-batch", type=int, default=0, help="completions of a backward pass in TRL; 0 for all")
    options = parser.parse_args(command)
    return run(compare, options, environment="trl")


def compare(options: argparse.Namespace) -> None:
    """Check, then run both sides in turns."""
    size = Size.of(options)
    settings = {"attention": options.attention, "cache": options.cache, "micro_batch": options.micro_batch}
    optimiser = OptimiserOptions(learning_rate=LEARNING_RATE, warmup_fraction=0.0, schedule="constant")
    workload = Workload(size, grpo={"beta": BETA}, optimiser=optimiser)
    report = Report("step against TRL", {**vars(size), **settings})
    with exported(workload) as directory:
        processor = Processor.from_pretrained(directory / "model")
        training = {"beta": BETA, "learning_rate": LEARNING_RATE, "audio_token": workload.run.model.audio_token_id}
        with start("trl", "trl", torch_settings(workload, directory, **settings, **training), options) as peer:
            check(report, workload, peer)
            sampling = {"ours": [], "TRL": []}

            def trl():
                sampling["TRL"].append(peer.ask(do="step")["sampling"])

            reference = {name: jnp.array(value, copy=True) for name, value in workload.state.params.items()}
            ours = partial(step, workload, reference, processor, sampling["ours"])
            timings = measure({"ours": ours, "TRL": trl}, rounds=options.rounds)
    timing_rows(report, size, timings)
    seconds = {name: statistics.median(values[1:]) for name, values in sampling.items()}
    report.note("of a step, encoding and sampling take " + ", ".join(f"{n} {s:.3g} s" for n, s in seconds.items()))
    report.note(f"peer: {peer.ready['versions']}, {peer.ready['threads']} threads")
    report.note(LACKING)
    judge(report, "whole step against TRL", timings["TRL"].median / timings["ours"].median, STEP_TARGET)
    report.finish(options.json)


def step(workload: Workload, reference: Params, processor: Processor, sampling: list[float]) -> dict[str, jax.Array]:
    """Take one of our steps, as jgrpo.train_grpo does; return the update's metrics, note the seconds of sampling."""
    began = time.perf_counter()
    workload.encoded = workload.encode()
    out = workload.completions()
    sampling.append(time.perf_counter() - began)
    processor.decode(out)
    trees = workload.trees(out)
    rest = (workload.frozen, workload.batch, workload.encoded, trees)
    ref_logp = workload.run.programs.score(reference, *rest)
    rewards = ((out.tokens % 2 == 0) & out.mask).sum(-1) / out.mask.sum(-1)
    learnt = {"mask": out.mask, "old_logp": out.logp, "advantage": advantages(rewards, "group")}
    return workload.update(Targets(trees=trees, ref_logp=ref_logp, **place(learnt, workload.run.mesh)))


def check(report: Report, workload: Workload, peer: Peer) -> None:
    """Compare the log-probs in TRL's first loss with ours for the same tokens, and with ours of silence.

    Raises:
        UserError: a gradient pass without audio, or log-probs that differ.
    """
    found = peer.ask(do="check")
    order = np.argsort(found["rows"], kind="stable")
    shape = (workload.size.prompts, workload.size.samples, workload.size.new_tokens)
    tokens = np.array(found["tokens"], np.int32)[order].reshape(shape)
    theirs = np.array(found["logps"], np.float32)[order].reshape(shape)
    mask = np.array(found["mask"], bool)[order].reshape(shape)
    if sorted(mask.sum(-1).reshape(-1)) != sorted(completion_shapes(workload.size)[0].reshape(-1)):
        raise UserError(f"TRL's completions have {mask.sum()} tokens; those of the lengths asked for have others")
    silent = dataclasses.replace(workload.batch, features=jnp.zeros_like(workload.batch.features))
    completions = Completions(tokens=tokens, mask=mask, logp=theirs)
    difference, unheard = (
        np.abs(theirs - full_logprobs(workload, batch, completions))[mask].max() for batch in (workload.batch, silent)
    )
    text = (
        f"check: {found['audio']} of {found['gradient']} gradient passes of TRL heard the audio; its log-probs differ "
        f"from ours by {difference:.1e} at most, from ours of silence by {unheard:.1e}"
    )
    differ = difference > AGREEMENT or unheard < 10 * difference
    if found["audio"] != found["gradient"] or (differ and workload.size.dtype == "float32"):
        raise UserError(f"{text}; allowed are {AGREEMENT:g} and at least 10 times the former")
    report.note(text)


if __name__ == "__main__":
    sys.exit(main())
