# SPDX-License-Identifier: Apache-2.0
"""Between the device's samples and its update: keys, references, rewards, advantages, metrics, as host arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from jgrpo.config import GRPOOptions
from jgrpo.core.advantages import group_advantages, zero_variance
from jgrpo.core.shaping import overlong_penalty
from jgrpo.core.tree import holds, layouts, pack, smallest, sort_rows
from jgrpo.data.pipeline import PromptBatch
from jgrpo.rewards import Reward
from jgrpo.rewards.reward import SourceRewards
from jgrpo.runtime.rows import gather
from model_port.batch import Batch, Completions, Trees
from model_port.sampling import row_keys

# The purpose folded into a seed's key: sampling for the stream's prompts, and for those that replace them in dynamic
# sampling; evaluation has its own.
ROLLOUT, FURTHER = 1, 3


def step_keys(seed: int, step: int, *, num_prompts: int, num_samples: int, round: int = 0) -> jax.Array:
    """Return keys [P, G], a pure function of seed, step, row and round.

    No two steps share noise, no two rollouts of a step (round counts the further ones of dynamic sampling from 1), and
    a resume repeats it.
    """
    key = jax.random.key(seed)
    for part in (ROLLOUT, step) if round == 0 else (FURTHER, step, round):
        key = jax.random.fold_in(key, part)
    return row_keys(key, num_prompts=num_prompts, num_samples=num_samples)


def with_references(out: Completions, prompts: PromptBatch, rows: slice) -> Completions:
    """Append the references of these prompts as the last member of each group; their log-probs are never read."""
    tokens, mask = prompts.reference_tokens[rows], prompts.reference_mask[rows]
    return Completions(
        tokens=np.concatenate([out.tokens, tokens], axis=1),
        mask=np.concatenate([out.mask, mask], axis=1),
        logp=np.concatenate([out.logp, np.zeros(tokens.shape, np.float32)], axis=1),
    )


def reference_rows(shape: tuple[int, int]) -> Bool[np.ndarray, "P G"]:
    """Return which completions are references where `with_references` has appended them."""
    return np.broadcast_to(np.arange(shape[1]) == shape[1] - 1, shape)


def flat_examples(
    texts: Sequence[Sequence[str]], prompts: PromptBatch, rows: slice
) -> tuple[list[str], list[str], dict[str, list[Any]], list[int] | None]:
    """Return completions, references, columns and sources, one value per completion of these prompts' groups."""

    def repeat(values):
        return [value for value, group in zip(values[rows], texts, strict=True) for _ in group]

    columns = {name: repeat(values) for name, values in prompts.columns.items()}
    sources = None if prompts.sources is None else repeat(prompts.sources.tolist())
    return [text for group in texts for text in group], repeat(prompts.references), columns, sources


def pack_completions(
    tokens: Int[np.ndarray, "P G T"], mask: Bool[np.ndarray, "P G T"], prompts: Batch, mesh: Mesh
) -> tuple[Trees, dict[str, float | int]]:
    """Return this process's completions as prefix trees, in the layout that all processes agree on, and metrics of it.

    The layout is the smallest that holds every group of the step, and so depends on its tokens alone.

    Args:
        mask: true up to and including the last token, also of completions that are not learnt from.
        prompts: that they belong to, on the host.
    """
    rows = sort_rows(tokens, mask)
    choices = layouts(*tokens.shape[1:], prompt_tokens=prompts.tokens.shape[1])
    own = {"held": holds(rows, choices), "prompt": prompts.mask.sum(1)}
    own |= {"tokens": rows.lengths.sum(1), "nodes": rows.distinct, "fed": rows.fed}
    step = gather(own, mesh)
    trees, slots = smallest(step["held"], choices)
    metrics = {
        "tree/trees": trees,
        "tree/slots": slots,
        "tree/tokens_per_node": float(step["tokens"].sum() / max(step["nodes"].sum(), 1)),
        "padding/prompts": float(1 - step["prompt"].mean() / prompts.tokens.shape[1]),
        "padding/nodes": float(1 - step["fed"].mean() / (trees * slots)),
    }
    return pack(rows, (trees, slots)), metrics


def score_groups(
    reward: Reward | SourceRewards,
    components: dict[str, np.ndarray],
    lengths: np.ndarray,
    options: GRPOOptions,
    *,
    limit: int,
    sources: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return rewards [P, G] and every component [P, G], a penalty for overlong completions among them if asked for.

    Args:
        components: of `reward`, [P, G].
        lengths: of the completions in tokens, [P, G].
        limit: the greatest length.
        sources: of the prompts [P], in a mixture.
    """
    total = reward.total(components) if sources is None else reward.total(components, sources)
    if options.overlong_buffer == 0:
        return total, components
    buffer, penalty = options.overlong_buffer, options.overlong_penalty
    overlong = overlong_penalty(lengths, limit=limit, buffer=buffer, penalty=penalty)
    return total + overlong, {**components, "overlong": overlong}


def advantages(rewards: np.ndarray, scale: str) -> np.ndarray:
    """Return float32 advantages [P, G], computed in float64."""
    return group_advantages(rewards.astype(np.float64), scale).astype(np.float32)


def learnt_tokens(
    mask: Bool[np.ndarray, "P G T"],
    eos: Bool[np.ndarray, "P G"],
    rewards: Float[np.ndarray, "P G"],
    options: GRPOOptions,
) -> Bool[np.ndarray, "P G T"]:
    """Return the mask without the completions and groups that the options leave out of the loss."""
    if options.mask_truncated:
        mask = mask & eos[:, :, None]
    if options.filter_zero_variance:
        mask = mask & ~zero_variance(rewards)[:, None, None]
    return mask


def fill_groups(groups: dict[str, Any], found: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Replace groups whose rewards are all equal by found ones whose rewards are not; return them and how many.

    No example comes in that is among `groups` already. Groups that cannot be replaced stay.

    Args:
        groups, found: trees of arrays whose first axis is prompts, "indices" and "rewards" among them.
    """
    lacking = np.flatnonzero(zero_variance(groups["rewards"]))
    held, rows = set(groups["indices"].tolist()), []
    for row in np.flatnonzero(~zero_variance(found["rewards"])).tolist():
        index = int(found["indices"][row])
        if index not in held and len(rows) < len(lacking):
            held.add(index)
            rows.append(row)

    def fill(old, new):
        filled = old.copy()
        filled[lacking[: len(rows)]] = new[rows]
        return filled

    return jax.tree.map(fill, groups, found), len(rows)


def ended(out: Completions, eos_ids: Sequence[int]) -> np.ndarray:
    """Return [P, G]: whether a completion wrote an end-of-sequence token."""
    return (np.isin(out.tokens, np.asarray(eos_ids)) & out.mask).any(-1)
