"""START HERE: Group Relative Policy Optimization, one step after the other.

    audio -> encode -> rollout -> text -> reward -> advantage -> update

`encode`, `rollout`, `score` and `update` are programs on the device (jgrpo.steps); between rollout and update the host
turns tokens into text, text into rewards and rewards into advantages. What follows from the config is built in
jgrpo.setup. Source: arXiv 2509.16990.
"""

import time

import jax

from jgrpo.config import GRPOConfig
from jgrpo.rewards import make_reward
from jgrpo.rollout import advantages, completion_rows, ended, rollout_metrics, score_groups, step_keys
from jgrpo.setup import Run, finish_run, finish_step, start_run
from jgrpo.steps import Targets, grpo_objective, place


def train_grpo(config: GRPOConfig) -> Run:
    """Run GRPO as configured, from the start or from the run directory's last checkpoint; return the finished run."""
    config.validate()
    grpo = config.grpo
    reward = make_reward(config.reward_spec())
    objective = grpo_objective(grpo, config.max_completion_tokens)
    run = start_run(config, objective, updates=config.num_steps * grpo.num_iterations, references=False)
    policy, programs, timer = run.policy, run.programs, run.timer
    shape = {"num_prompts": config.prompts_per_step, "num_samples": grpo.num_samples}
    sampling = {"num_tokens": config.max_completion_tokens, "temperature": grpo.temperature, "top_p": 1.0}

    with run:  # closes its files, whatever happens
        stream = run.data.stream(seed=config.seed, start_step=run.step)
        while run.step < config.num_steps:
            started = time.perf_counter()
            with timer("data"):
                prompts = next(stream)
                batch = place(prompts.batch, policy.mesh)
            with timer("encode"):
                encoded = jax.block_until_ready(run.encode(run.state.params, run.data, prompts, batch))

            # 1. Sample a group of completions for every prompt.
            with timer("rollout"):
                keys = place(step_keys(config.seed, run.step, **shape), policy.mesh)
                out = programs.rollout(run.state.params, policy.frozen, batch, encoded, keys, **sampling)
                host = jax.device_get(out)

            # 2. The device scores them under the frozen initial policy while the host computes rewards and advantages.
            ref_logp = None
            if grpo.beta > 0:
                ref_logp = programs.score(run.reference, policy.frozen, batch, encoded, out.tokens)
            with timer("reward"):
                texts = policy.processor.decode(host)
                rewards, components = score_groups(reward, texts, prompts)
                values = advantages(rewards, grpo.advantage_scale)
            with timer("score"):
                jax.block_until_ready(ref_logp)

            # 3. Push up what did better than its group, and the rest down.
            targets = Targets(
                tokens=out.tokens,
                mask=out.mask,
                old_logp=out.logp,
                ref_logp=ref_logp,
                advantage=place(values, policy.mesh),
            )
            with timer("update"):
                for _ in range(grpo.num_iterations):
                    run.state, metrics = programs.update(run.state, policy.frozen, batch, encoded, targets)
                metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}

            seconds = time.perf_counter() - started
            eos = ended(host, policy.processor.eos_ids)
            metrics |= rollout_metrics(rewards, components, host.mask, eos)
            metrics |= {
                "num_tokens": int(host.mask.sum()),
                "tokens_per_second": host.mask.sum() / seconds,
                "seconds": seconds,
            }
            if config.completions_every and run.step % config.completions_every == 0:
                run.metrics.write_completions(run.step + 1, completion_rows(prompts, texts, rewards, values))
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
