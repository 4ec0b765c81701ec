# SPDX-License-Identifier: Apache-2.0
"""START HERE: Group Relative Policy Optimization, one step after the other.

    audio -> encode -> rollout -> text -> reward -> advantage -> update

`encode`, `rollout`, `score` and `update` are programs on the device (jgrpo.programs); between rollout and update the
host turns tokens into text, text into rewards and rewards into advantages (jgrpo.rollout). What follows from the config
is built in jgrpo.setup, and what the end of a step does is in jgrpo.loop. Source: arXiv 2509.16990.
"""

import time

import jax

from jgrpo.config import GRPOConfig
from jgrpo.loop import finish_run, finish_step
from jgrpo.programs.steps import Targets, apply_updates, grpo_objective
from jgrpo.rewards import RewardPool
from jgrpo.rollout.groups import GroupSampler
from jgrpo.rollout.metrics import step_metrics, write_completions
from jgrpo.rollout.scoring import advantages, learnt_tokens, pack_completions, reference_rows
from jgrpo.runtime.rows import place
from jgrpo.setup import Run, start_run


def train_grpo(config: GRPOConfig, *, sampler: type[GroupSampler] = GroupSampler) -> Run:
    """Run GRPO as configured, from the start or from the run directory's last checkpoint; return the finished run.

    Args:
        sampler: what samples and scores the groups of a step.
    """
    config.validate()
    grpo = config.grpo
    objective = grpo_objective(grpo, config.max_completion_tokens)
    scoring = {"workers": grpo.reward_workers, "options": config.metrics, "scale": grpo.reward_scale}
    plan = {"updates": config.num_updates(), "references": grpo.mixed_policy}
    passes = {"iterations": grpo.num_iterations, "minibatches": grpo.num_minibatches}

    # Both end what they have started, whatever happens.
    with RewardPool(config.reward_spec(), **scoring) as pool, start_run(config, objective, **plan) as run:
        policy, programs, timer = run.policy, run.programs, run.timer
        sample_groups = sampler(run, pool, config)
        stream = run.data.stream(seed=config.seed, start_step=run.step)
        while run.step < config.num_steps:
            started = time.perf_counter()
            with timer("data"):
                prompts = next(stream)

            # 1. Sample a group of completions for every prompt; the host starts on their rewards.
            groups = sample_groups(prompts)
            host, inputs = groups.completions, (groups.batch, groups.encoded)

            # 2. Meanwhile the device scores them under the frozen initial policy. What a group's completions have in
            # common is computed once.
            trees, packing = pack_completions(host.tokens, host.mask, groups.prompts.batch, policy.mesh)
            trees, ref_logp = place(trees, policy.mesh), None
            if grpo.beta > 0:
                ref_logp = programs.score(run.ref_params, policy.frozen, *inputs, trees)
            with timer("score"):
                jax.block_until_ready(ref_logp)
            with timer("reward_wait"):
                scores = sample_groups.gather_scores(groups)

            # 3. Push up what did better than its group, and the rest down.
            values, own = advantages(scores.rewards, grpo.advantage_scale), groups.rows
            learnt = {
                "mask": learnt_tokens(host.mask, scores.ended[own], scores.rewards[own], grpo),
                "old_logp": host.logp,
                "advantage": values[own],
                "is_off_policy": reference_rows(values[own].shape) if grpo.mixed_policy else None,
            }
            with timer("update"):
                targets = Targets(trees=trees, ref_logp=ref_logp, **place(learnt, policy.mesh))
                run.state, metrics = apply_updates(programs, run.state, policy.frozen, *inputs, targets, **passes)

            metrics |= packing | step_metrics(groups, scores, values, mixed=grpo.mixed_policy)
            seconds = time.perf_counter() - started
            metrics |= {"tokens_per_second": metrics["num_tokens"] / seconds, "seconds": seconds}
            if config.completions_every and run.step % config.completions_every == 0:
                write_completions(run, groups, scores, values)
            finish_step(run, metrics, _shown(metrics))
        finish_run(run)
    return run


def _shown(metrics: dict) -> dict[str, float]:
    """Return what the progress line shows; without a reference (beta 0) there is no KL."""
    names = {
        "reward": "reward",
        "kl": "kl",
        "length": "completions/mean_length",
        "tokens/s": "tokens_per_second",
    }
    return {short: metrics[name] for short, name in names.items() if name in metrics}
