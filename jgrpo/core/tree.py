# SPDX-License-Identifier: Apache-2.0
"""The prefix trees of groups: where completions begin alike they are computed once, and no shape is paid for.

The completions of a group become the nodes of one or several trees of a fixed number of slots. A node is a token after
the tokens before it; completions that share a beginning share its nodes. Nodes that something follows are fed to the
model, in depth-first order, so that node j is an ancestor of node i, or i itself, just where j <= i < ends[j]. Nodes
that nothing follows are predicted only, and take no slot. A layout (F, M) is F trees of M slots for every group of a
step; trees do not see each other, so that a beginning in two of them is computed twice, and scores cost F M^2.

P prompts, G samples per prompt, T completion tokens, N = F M + G nodes. All of it is NumPy on the host.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from model_port.batch import Trees

Layout = tuple[int, int]

# Slots of a single tree at most, and of one of several at least, unless T - 1 is more or all there is is less: scores
# cost F M^2, and sharing more does not pay for that of wider ones.
WIDEST, LEAST_OF_SEVERAL = 256, 128
NARROWEST, STEP = 32, 8
# Columns of a layout, those of the prompt among them, over those of the one before it; each layout is a compilation.
GROWTH, GROWTH_OF_SEVERAL = 1.45, 1.2


def layouts(num_samples: int, num_tokens: int, *, prompt_tokens: int) -> list[Layout]:
    """Return the layouts of a step, by rising cost: few, so that few programs are compiled.

    The last is (G, T - 1), a tree for every completion: it holds any group, so no step costs more than if each
    completion were padded to T, and a run's memory is what this layout needs.

    >>> layouts(8, 200, prompt_tokens=130)
    [(1, 56), (1, 136), (1, 256), (2, 200), (3, 200), (4, 200), (5, 200), (8, 199)]
    >>> layouts(8, 20, prompt_tokens=46)
    [(1, 48), (1, 88), (8, 19)]
    """
    longest = max(num_tokens - 1, 1)
    one, last = min(max(longest, WIDEST), num_samples * longest), (num_samples, longest)

    def columns(layout: Layout) -> int:
        return prompt_tokens + layout[0] * layout[1]

    found = [(1, one)]
    while True:
        smaller = (1, round((columns(found[0]) / GROWTH - prompt_tokens) / STEP) * STEP)
        if smaller[1] < NARROWEST or smaller[1] >= found[0][1]:
            break
        found.insert(0, smaller)
    slots = -(-max(longest, LEAST_OF_SEVERAL) // STEP) * STEP
    for layout in ((trees, slots) for trees in range(2, num_samples)):
        if columns(layout) >= GROWTH_OF_SEVERAL * columns(found[-1]):
            found.append(layout)
    return [layout for layout in found if GROWTH_OF_SEVERAL * columns(layout) <= columns(last)] + [last]


@dataclass(frozen=True)
class Rows:
    """Completions of P groups, those with equal beginnings side by side.

    Attributes:
        order: which completion stands at each place.
        tokens: of the completions in that order, cut to the longest.
        lengths: in tokens.
        common: leading tokens that are those of the completion before it; 0 of the first.
        num_tokens: T of the completions as they came.
    """

    order: Int[np.ndarray, "P G"]
    tokens: Int[np.ndarray, "P G t"]
    lengths: Int[np.ndarray, "P G"]
    common: Int[np.ndarray, "P G"]
    num_tokens: int

    @property
    def distinct(self) -> Int[np.ndarray, " P"]:
        """How many nodes each group has: distinct beginnings of its completions."""
        return (self.lengths - self.common).sum(1)

    @functools.cached_property
    def fed(self) -> Int[np.ndarray, " P"]:
        """How many of them something follows: what each group fills of one tree that is large enough."""
        return _deal(self, (1, self.tokens.size)).filled.sum(1)


def sort_rows(tokens: Int[np.ndarray, "P G T"], mask: Bool[np.ndarray, "P G T"], *, share: bool = True) -> Rows:
    """Sort the completions of each group so that equal beginnings stand side by side.

    Args:
        mask: true up to and including the last token of a completion.
        share: whether beginnings are shared at all; if not, the completions stay in their order.

    Raises:
        ValueError: a mask with a gap.
    """
    lengths = mask.sum(-1).astype(np.int32)
    longest = max(int(lengths.max(initial=0)), 1)
    num_tokens, tokens, mask = tokens.shape[2], tokens[:, :, :longest], mask[:, :, :longest]
    if (mask != (np.arange(longest) < lengths[..., None])).any():
        raise ValueError("the mask of a completion must be true from its first to its last token")
    # Ids from 1, so that the end of a completion sorts before whatever goes on.
    keys = np.where(mask, tokens.astype(np.int64) + 1, 0).astype(np.uint32)
    group, order = np.arange(len(keys))[:, None], np.broadcast_to(np.arange(keys.shape[1]), keys.shape[:2])
    common = np.zeros(lengths.shape, np.int32)
    if share:
        # As strings of bytes: in any byte order, those with the same first tokens stand together.
        order = np.argsort(keys.view(f"S{4 * longest}")[..., 0], axis=1, kind="stable")
        keys = keys[group, order]
        same = (keys[:, 1:] == keys[:, :-1]) & (keys[:, 1:] > 0)
        common[:, 1:] = np.where(same.all(-1), longest, np.argmin(same, axis=-1))
    return Rows(order, tokens[group, order], lengths[group, order], common, num_tokens)


@dataclass(frozen=True)
class _Dealt:
    """Rows dealt out to F trees.

    Attributes:
        tree: of each row; -1 where none has room.
        common: leading tokens that are those of the row before it in its tree.
        filled: slots of each tree.
    """

    tree: Int[np.ndarray, "P G"]
    common: Int[np.ndarray, "P G"]
    filled: Int[np.ndarray, "P F"]


def _deal(rows: Rows, layout: Layout) -> _Dealt:
    """Put every row into the tree where it adds the fewest slots, of those with room; an empty one comes last."""
    (groups, samples), (trees, slots) = rows.lengths.shape, layout
    every = np.arange(groups)
    tree, common = (np.full((groups, samples), -1, np.int32) for _ in range(2))
    # Of each tree: its slots that are filled, its last row's length, and what that shares with the row to be dealt.
    filled, last, shared = (np.zeros((groups, trees), np.int32) for _ in range(3))
    for row in range(samples):
        length = rows.lengths[:, row, None]
        shared = np.minimum(shared, rows.common[:, row, None])
        # The last token of a row that this one continues becomes a node that something follows.
        continues = (shared > 0) & (shared == last) & (length > shared)
        added = np.maximum(length - 1 - shared, 0) + continues
        added = np.where(filled + added <= slots, added, np.iinfo(np.int32).max)
        best = added.argmin(1)
        fits = added[every, best] <= slots
        tree[fits, row] = best[fits]
        common[:, row] = shared[every, best]
        filled[every[fits], best[fits]] += added[every, best][fits]
        last[every[fits], best[fits]] = length[fits, 0]
        shared[every[fits], best[fits]] = length[fits, 0]
    return _Dealt(tree, common, filled)


def holds(rows: Rows, choices: Sequence[Layout]) -> Bool[np.ndarray, "P K"]:
    """Return for each group which of the K layouts hold it; where one group cannot fit, others may be said not to.

    A larger layout does not always hold what a smaller one does: what one tree shares is doubled in two.
    """
    (groups, samples), longest = rows.lengths.shape, rows.lengths.max(initial=1)
    found = np.zeros((groups, len(choices)), bool)
    before = 0  # slots of the trees of which the layout before has enough for every group
    for k, (trees, slots) in enumerate(choices):
        if trees == 1:
            found[:, k] = rows.fed <= slots
        elif slots == before or (trees == samples and slots >= longest - 1):
            found[:, k] = True
        elif rows.fed.max() <= trees * slots:
            found[:, k] = (_deal(rows, (trees, slots)).tree >= 0).all(1)
        before = slots if found[:, k].all() else 0
    return found


def smallest(held: Bool[np.ndarray, "P K"], choices: Sequence[Layout]) -> Layout:
    """Return the first layout that holds every group; `held` is that of `holds`, of the groups of all processes."""
    every = held.all(0)
    if not every.any():
        raise ValueError(f"none of the layouts {choices} holds every group")
    return choices[int(every.argmax())]


def pack(rows: Rows, layout: Layout) -> Trees:
    """Return the trees of P groups, F of M slots each.

    Raises:
        ValueError: the layout does not hold a group.
    """
    dealt, (trees, slots) = _deal(rows, layout), layout
    if (dealt.tree < 0).any():
        raise ValueError(f"the layout {layout} does not hold every group")
    # From here on rows stand tree by tree.
    group, turn = np.arange(len(rows.order))[:, None], np.argsort(dealt.tree, axis=1, kind="stable")
    tree, common = dealt.tree[group, turn], dealt.common[group, turn]
    tokens, lengths, order = rows.tokens[group, turn], rows.lengths[group, turn], rows.order[group, turn]
    groups, samples, longest = tokens.shape
    row, depth = np.arange(samples, dtype=np.int32)[:, None], np.arange(longest, dtype=np.int32)
    same = np.diff(tree, axis=1) == 0  # [P, G - 1]: whether the next row is in the same tree

    # A row begins a node at each depth that it does not share with the row before it; its slots come after that row's.
    begins = (depth >= common[..., None]) & (depth < lengths[..., None])
    fed = begins & (depth + 1 < (lengths + _followed(same, common, lengths))[..., None])
    count = fed.sum(-1, dtype=np.int32)
    before = np.cumsum(count, axis=1, dtype=np.int32) - count
    opens = np.concatenate([np.ones((groups, 1), bool), ~same], axis=1)
    first = before - np.maximum.accumulate(np.where(opens, before, 0), axis=1)
    slot = tree[..., None] * slots + first[..., None] + depth - common[..., None]
    node = np.where(fed, slot, trees * slots + row)
    # The node of a token is the one that was begun last at its depth.
    begun = np.maximum.accumulate(np.where(begins, row.astype(np.int64) << 32 | node, 0), axis=1)
    node = np.where(depth < lengths[..., None], begun & 0xFFFFFFFF, 0).astype(np.int32)

    found = {
        "tokens": np.zeros((groups, trees * slots + samples), np.int32),
        "parents": np.full((groups, trees * slots + samples), -1, np.int32),
        "depths": np.zeros((groups, trees * slots), np.int32),
        "ends": np.tile(np.arange(1, slots + 1, dtype=np.int32), (groups, trees)),
        "node_of": np.zeros((groups, samples, rows.num_tokens), np.int32),
    }
    parents = np.concatenate([np.full((groups, samples, 1), -1, np.int32), node[:, :, :-1]], axis=2)
    ends = _subtree_ends(same, common, first, count, depth)
    for chosen, values in (
        (begins, {"tokens": tokens, "parents": parents}),
        (fed, {"depths": np.broadcast_to(depth, tokens.shape), "ends": ends}),
    ):
        flat = (node + group[..., None] * found[next(iter(values))].shape[1])[chosen]
        for name, value in values.items():
            found[name].reshape(-1)[flat] = value[chosen]
    found["node_of"][group, order, :longest] = node
    forest = {name: found.pop(name).reshape(groups, trees, slots) for name in ("depths", "ends")}
    return Trees(**found, **forest)


def _followed(same, common, lengths) -> Bool[np.ndarray, "P G"]:
    """Return whether a later row of the tree goes on after a row's last token; between the two there may be twins."""
    found = np.zeros(lengths.shape, bool)
    for row in reversed(range(lengths.shape[1] - 1)):
        whole = same[:, row] & (common[:, row + 1] >= lengths[:, row])
        found[:, row] = whole & ((lengths[:, row + 1] > lengths[:, row]) | found[:, row + 1])
    return found


def _subtree_ends(same, common, first, count, depth) -> Int[np.ndarray, "P G t"]:
    """Return where the subtree of a row's node ends: at the next row that shares no more than the tokens before it.

    Args:
        first, count: the slots of a row, in its tree.
    """
    last = (first + count)[..., None]
    found = np.broadcast_to(last, (*last.shape[:2], len(depth))).copy()
    for row in reversed(range(last.shape[1] - 1)):
        inside = common[:, row + 1, None] > depth
        later = np.where(inside, found[:, row + 1], first[:, row + 1, None])
        found[:, row] = np.where(same[:, row, None], later, last[:, row])
    return found
