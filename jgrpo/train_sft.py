# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on the references: the baseline, on the same state, data, programs and checkpoints as GRPO."""

import time

import jax
import numpy as np

from jgrpo.config import SFTConfig
from jgrpo.loop import finish_run, finish_step
from jgrpo.programs.steps import Targets, apply_updates, sft_objective
from jgrpo.rollout.scoring import pack_completions
from jgrpo.runtime.rows import gather, place
from jgrpo.setup import Run, start_run
from model_port.batch import Trees


def train_sft(config: SFTConfig) -> Run:
    """Train as configured, from the start or from the run directory's last checkpoint; return the finished run."""
    run = start_run(config, sft_objective(), updates=config.num_steps, references=True)
    policy, programs, timer = run.policy, run.programs, run.timer

    with run:  # closes its files, whatever happens
        stream = run.data.stream(seed=config.seed, start_step=run.step)
        while run.step < config.num_steps:
            started = time.perf_counter()
            with timer("data"):
                prompts = next(stream)
                batch = place(prompts.batch, policy.mesh)
                references = prompts.reference_tokens, prompts.reference_mask
                trees, packing = pack_completions(*references, prompts.batch, policy.mesh)
                targets = place(reference_targets(trees, prompts.reference_mask), policy.mesh)
            with timer("encode"):
                encoded = jax.block_until_ready(run.encode(run.state.params, run.data, prompts, batch))
            with timer("update"):
                run.state, metrics = apply_updates(programs, run.state, policy.frozen, batch, encoded, targets)

            # Nothing was sampled, so there is nothing to drift from, and every reference has tokens.
            del metrics["logp_drift"], metrics["logp_drift_max"], metrics["empty"]
            lengths = gather(prompts.reference_mask.sum(-1), policy.mesh)
            seconds, tokens = time.perf_counter() - started, int(lengths.sum())
            metrics |= packing | {"num_tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds}
            metrics["completions/mean_length"] = float(lengths.mean())
            finish_step(run, metrics, {"loss": metrics["loss"], "tokens/s": metrics["tokens_per_second"]})
        finish_run(run)
    return run


def reference_targets(trees: Trees, mask: np.ndarray) -> Targets:
    """Return references as targets of supervised learning; `mask` [P, 1, T] is true where they have a token."""
    zeros = np.zeros(mask.shape, np.float32)
    return Targets(trees=trees, mask=mask, old_logp=zeros, ref_logp=None, advantage=np.ones(mask.shape[:2], np.float32))
