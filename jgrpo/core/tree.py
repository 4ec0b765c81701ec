"""The prefix trees of groups: where completions begin alike they are computed once, and no shape is paid for.

The completions of a group become the nodes of one or several trees of a fixed number of slots. A node is a token after
the tokens before it; completions that share a beginning share its nodes. Nodes that something follows are fed to the
model, in depth-first order, so that node j is an ancestor of node i, or i itself, just where j <= i < ends[j]. Nodes
that nothing follows are predicted only, and take no slot. A layout (F, M) is F trees of M slots for every group of a
step; trees do not see each other, so that a beginning in two of them is computed twice, and scores cost F M^2.

P prompts, G samples per prompt, T completion tokens, N = F M + G nodes. All of it is NumPy on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from model_port.batch import Trees

Layout = tuple[int, int]

# Beyond this many slots the scores of one tree cost more than several trees that share less.
WIDEST = 256
NARROWEST, STEP = 32, 8
# Columns of a layout over those of the next one with a single tree, the prompt's counted; each layout is a compilation.
GROWTH = 1.5
# A layout that needs more than this share of the last one's columns is not worth a compilation of its own.
SHARE_OF_LAST = 0.8


def layouts(num_samples: int, num_tokens: int, *, prompt_tokens: int) -> list[Layout]:
    """Return the layouts of a step, by rising cost: few, so that few programs are compiled.

    The last is (G, T - 1), a tree for every completion: it holds any group, so no step costs more than if each
    completion were padded to T, and a run's memory is what this layout needs.

    >>> layouts(8, 200, prompt_tokens=130)
    [(1, 48), (1, 128), (1, 256), (2, 256), (4, 256), (8, 199)]
    >>> layouts(8, 20, prompt_tokens=46)
    [(1, 48), (1, 88), (8, 19)]
    """
    longest = max(num_tokens - 1, 1)
    last = (num_samples, longest)
    one = min(max(longest, WIDEST), num_samples * longest)
    found, slots = [(1, one)], one
    while True:
        wanted = (prompt_tokens + slots) / GROWTH - prompt_tokens
        smaller = -(-max(wanted, 0) // STEP) * STEP
        if smaller < NARROWEST or smaller >= slots:
            break
        slots = int(smaller)
        found.insert(0, (1, slots))
    while found[-1][0] < num_samples:
        found.append((2 * found[-1][0], one))
    most = SHARE_OF_LAST * (prompt_tokens + num_samples * longest)
    return [layout for layout in found if prompt_tokens + layout[0] * layout[1] <= most] + [last]


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

    def distinct(self) -> Int[np.ndarray, " P"]:
        """Return how many nodes each group has: distinct beginnings of its completions."""
        return (self.lengths - self.common).sum(1)

    def fed(self) -> Int[np.ndarray, " P"]:
        """Return how many of them something follows: what each group fills of one tree that is large enough."""
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
    order = np.broadcast_to(np.arange(keys.shape[1]), keys.shape[:2])
    common = np.zeros(lengths.shape, np.int32)
    if share:
        # As strings of bytes: in any byte order, those with the same first tokens stand together.
        order = np.argsort(keys.view(f"S{4 * longest}")[..., 0], axis=1, kind="stable")
        keys = np.take_along_axis(keys, order[..., None], axis=1)
        same = (keys[:, 1:] == keys[:, :-1]) & (keys[:, 1:] > 0)
        common[:, 1:] = np.where(same.all(-1), longest, np.argmin(same, axis=-1))
    sorted_tokens = np.take_along_axis(tokens, order[..., None], axis=1)
    return Rows(order, sorted_tokens, np.take_along_axis(lengths, order, axis=1), common, num_tokens)


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


def first_fit(rows: Rows, choices: Sequence[Layout]) -> Int[np.ndarray, " P"]:
    """Return for each group which of the layouts is the first that holds it; each later one does, too.

    Raises:
        ValueError: not even the last one.
    """
    fits = np.stack([(_deal(rows, layout).tree >= 0).all(1) for layout in choices])
    if not fits[-1].all():
        raise ValueError(f"no layout of {choices} holds a group of {rows.lengths.sum(1).max()} tokens")
    return fits.argmax(0)


def pack(rows: Rows, layout: Layout) -> Trees:
    """Return the trees of P groups, F of M slots each.

    Raises:
        ValueError: the layout does not hold a group.
    """
    dealt, (trees, slots) = _deal(rows, layout), layout
    if (dealt.tree < 0).any():
        raise ValueError(f"the layout {layout} does not hold every group")
    # From here on rows stand tree by tree.
    turn = np.argsort(dealt.tree, axis=1, kind="stable")
    tree, common, lengths, order = (
        np.take_along_axis(x, turn, axis=1) for x in (dealt.tree, dealt.common, rows.lengths, rows.order)
    )
    tokens = np.take_along_axis(rows.tokens, turn[..., None], axis=1)
    (groups, samples, longest), row, depth = tokens.shape, np.arange(rows.order.shape[1]), np.arange(tokens.shape[2])
    same = np.diff(tree, axis=1) == 0  # [P, G - 1]: whether the next row is in the same tree

    # A row begins a node at each depth that it does not share with the row before it; its slots come after that row's.
    begins = (depth >= common[..., None]) & (depth < lengths[..., None])
    fed = begins & (depth + 1 < (lengths + _followed(same, common, lengths))[..., None])
    count = fed.sum(-1)
    before = np.cumsum(count, axis=1) - count
    opens = np.concatenate([np.ones((groups, 1), bool), ~same], axis=1)
    first = before - np.maximum.accumulate(np.where(opens, before, 0), axis=1)
    slot = tree[..., None] * slots + first[..., None] + depth - common[..., None]
    node = np.where(fed, slot, trees * slots + row[:, None])
    # The node of a token is the one that was begun last at its depth.
    begun = np.maximum.accumulate(np.where(begins, row[:, None], 0), axis=1)
    node = np.where(depth < lengths[..., None], np.take_along_axis(node, begun, axis=1), 0)

    found = {
        "tokens": np.zeros((groups, trees * slots + samples), np.int32),
        "parents": np.full((groups, trees * slots + samples), -1, np.int32),
        "depths": np.zeros((groups, trees * slots), np.int32),
        "ends": np.tile(np.arange(1, slots + 1, dtype=np.int32), (groups, trees)),
        "node_of": np.zeros((groups, samples, rows.num_tokens), np.int32),
    }
    parents = np.concatenate([np.full((groups, samples, 1), -1), node[:, :, :-1]], axis=2)
    depths, ends = np.broadcast_to(depth, tokens.shape), _subtree_ends(same, common, first, count, depth)
    for name, chosen, values in (
        ("tokens", begins, tokens),
        ("parents", begins, parents),
        ("depths", fed, depths),
        ("ends", fed, ends),
    ):
        found[name][np.nonzero(chosen)[0], node[chosen]] = values[chosen]
    np.put_along_axis(found["node_of"][:, :, :longest], order[..., None], node.astype(np.int32), axis=1)
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
