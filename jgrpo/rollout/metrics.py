# SPDX-License-Identifier: Apache-2.0
"""What is told of a rollout: its metrics, and the file of its completions."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jgrpo.core.advantages import zero_variance
from jgrpo.data.pipeline import PromptData
from jgrpo.rollout.groups import Groups, Scores
from jgrpo.runtime.rows import gather
from jgrpo.setup import Run


def step_metrics(groups: Groups, scores: Scores, values: np.ndarray, *, mixed: bool) -> dict[str, float]:
    """Return the metrics of a rollout: those of the sampled completions, and with `mixed` those of the references.

    Args:
        values: the advantages [P, G].
    """
    sampled = np.s_[:, :-1] if mixed else np.s_[:]
    rewards, components, lengths, eos = jax.tree.map(
        lambda values: values[sampled], (scores.rewards, scores.components, scores.lengths, scores.ended)
    )
    metrics = rollout_metrics(rewards, components, lengths, eos)
    metrics |= source_metrics(scores.sources, groups.prompts.source_names, rewards)
    if mixed:
        metrics |= mixed_metrics(scores.rewards, values)
    return metrics | groups.metrics


def write_completions(run: Run, groups: Groups, scores: Scores, values: np.ndarray) -> None:
    """Write down what the step sampled for all prompts, with its rewards and the advantages `values` [P, G]."""
    own = {"completions": groups.completions, "indices": groups.prompts.indices}
    whole = gather(own, run.policy.mesh)
    texts = run.policy.processor.decode(whole["completions"])
    run.metrics.write_completions(
        run.step + 1, completion_rows(run.data, whole["indices"], texts, scores.rewards, values)
    )


def rollout_metrics(
    rewards: np.ndarray, components: dict[str, np.ndarray], lengths: np.ndarray, eos: np.ndarray
) -> dict[str, Any]:
    """Return the metrics of sampled completions, named as TRL's users know them.

    The mean of a component is over the completions that have it: NaN are those of another source of a mixture.

    Args:
        lengths: of the completions in tokens [P, G].
        eos: whether each completion ended by itself [P, G].
    """
    known = [(name, value, ~np.isnan(value)) for name, value in components.items()]
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(axis=1, ddof=1).mean()) if rewards.shape[1] > 1 else 0.0,
        "frac_reward_zero_std": float(zero_variance(rewards).mean()),
        **{f"rewards/{name}/mean": float(value[there].mean()) for name, value, there in known if there.any()},
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": float(1.0 - eos.mean()),
        "num_tokens": int(lengths.sum()),
    }


def source_metrics(
    sources: Int[np.ndarray, " P"] | None, names: Sequence[str], rewards: Float[np.ndarray, "P G"]
) -> dict[str, float]:
    """Return the mean reward of each source of a mixture that has prompts in the step."""
    present = [] if sources is None else np.unique(sources).tolist()
    return {f"reward/{names[source]}": float(rewards[sources == source].mean()) for source in present}


def mixed_metrics(rewards: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Return what is known of the references, the last of each group; `values` are the advantages [P, G]."""
    return {
        "frac_reward_zero_std": float(zero_variance(rewards).mean()),
        "mixed/reference_reward": float(rewards[:, -1].mean()),
        "mixed/reference_advantage": float(values[:, -1].mean()),
    }


def completion_rows(
    data: PromptData, indices: Int[np.ndarray, " P"], texts: Sequence[Sequence[str]], rewards, values
) -> list[dict[str, Any]]:
    """Return one row per prompt for the completions file; `rewards` and `values`, the advantages, are [P, G]."""
    return [
        {
            "index": index,
            **({"source": data.source_of(index)} if data.sources else {}),
            "prompt": data.examples.prompts[index],
            "reference": data.examples.references[index],
            "completions": list(texts[p]),
            "rewards": rewards[p].tolist(),
            "advantages": values[p].tolist(),
        }
        for p, index in enumerate(indices.tolist())
    ]
