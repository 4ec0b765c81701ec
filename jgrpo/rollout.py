"""From prompts to scored groups: sample on the device, score on the host, turn rewards into advantages."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jgrpo.core.advantages import group_advantages, zero_variance
from jgrpo.data.pipeline import PromptBatch
from jgrpo.rewards import Reward
from model_port.batch import Completions
from model_port.sampling import row_keys

ROLLOUT = 1  # the purpose folded into a step's key; evaluation has its own


def step_keys(seed: int, step: int, *, num_prompts: int, num_samples: int) -> jax.Array:
    """Return keys [P, G], a pure function of seed, step and row: no two steps share noise, and a resume repeats it."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ROLLOUT), step)
    return row_keys(key, num_prompts=num_prompts, num_samples=num_samples)


def score_groups(
    reward: Reward, texts: Sequence[Sequence[str]], prompts: PromptBatch
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return rewards [P, G] and every component's [P, G]; references and columns are repeated over the group."""
    samples = len(texts[0])
    flat = [text for group in texts for text in group]
    references = [reference for reference in prompts.references for _ in range(samples)]
    columns = {name: [value for value in values for _ in range(samples)] for name, values in prompts.columns.items()}
    components = reward.components(flat, references, **columns)
    shape = (len(texts), samples)
    return reward.total(components).reshape(shape), {name: value.reshape(shape) for name, value in components.items()}


def advantages(rewards: np.ndarray, scale: str) -> np.ndarray:
    """Return float32 advantages [P, G], computed in float64."""
    return group_advantages(rewards.astype(np.float64), scale).astype(np.float32)


def rollout_metrics(
    rewards: np.ndarray, components: dict[str, np.ndarray], mask: np.ndarray, eos: np.ndarray
) -> dict[str, Any]:
    """Return the metrics of a rollout, named as TRL's users know them.

    Args:
        mask: of the completions [P, G, T].
        eos: whether each completion ended by itself [P, G].
    """
    lengths = mask.sum(-1)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(axis=1, ddof=1).mean()) if rewards.shape[1] > 1 else 0.0,
        "frac_reward_zero_std": float(zero_variance(rewards).mean()),
        **{f"rewards/{name}/mean": float(value.mean()) for name, value in components.items()},
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": float(1.0 - eos.mean()),
    }


def ended(out: Completions, eos_ids: Sequence[int]) -> np.ndarray:
    """Return [P, G]: whether a completion wrote an end-of-sequence token."""
    return (np.isin(out.tokens, np.asarray(eos_ids)) & out.mask).any(-1)


def completion_rows(prompts: PromptBatch, texts, rewards, values) -> list[dict[str, Any]]:
    """Return one row per prompt for the completions file."""
    return [
        {
            "index": int(prompts.indices[p]),
            "prompt": prompts.prompts[p],
            "reference": prompts.references[p],
            "completions": list(texts[p]),
            "rewards": rewards[p].tolist(),
            "advantages": values[p].tolist(),
        }
        for p in range(len(texts))
    ]
