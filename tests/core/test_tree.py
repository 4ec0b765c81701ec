"""Prefix trees against a trie that is built one token after the other."""

import time

import numpy as np
import pytest

from jgrpo.core.tree import holds, layouts, pack, smallest, sort_rows


def group_of(random, samples, num_tokens, ids):
    """Completions of all lengths from none to T: branches of few ids, twins, and beginnings of one another."""
    rows = []
    for _ in range(samples):
        kind = random.integers(4) if rows else 0
        row = rows[random.integers(len(rows))] if kind else []
        cut = random.integers(len(row) + 1) if kind > 1 else len(row)
        more = random.integers(num_tokens + 1) if kind in (0, 3) else 0
        rows.append((list(row[:cut]) + random.choice(ids, more).tolist())[:num_tokens])
    return rows


def arrays_of(groups, num_tokens, pad=0):
    """Return tokens and mask [P, G, T]."""
    tokens = np.full((len(groups), len(groups[0]), num_tokens), pad, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for p, rows in enumerate(groups):
        for g, row in enumerate(rows):
            tokens[p, g, : len(row)], mask[p, g, : len(row)] = row, True
    return tokens, mask


def check(groups, num_tokens, layout, *, share=True):
    """Compare the trees with the completions they are made of: nothing is dropped, and nothing sees what it may not."""
    tokens, mask = arrays_of(groups, num_tokens)
    trees = pack(sort_rows(tokens, mask, share=share), layout)
    (forest, slots), samples = layout, tokens.shape[1]
    assert trees.tokens.shape == trees.parents.shape == (len(groups), forest * slots + samples)
    assert trees.node_of.shape == tokens.shape and (trees.node_of[~mask] == 0).all()
    index = np.arange(slots)
    visible = (index <= index[:, None]) & (index[:, None] < trees.ends[:, :, None, :])
    for p, rows in enumerate(groups):
        beginnings = {}
        for g, row in enumerate(rows):
            path = []
            for t, token in enumerate(row):
                node = int(trees.node_of[p, g, t])
                assert trees.tokens[p, node] == token
                assert trees.parents[p, node] == (path[-1] if path else -1)
                # One node for one beginning; the other way round there may be one in each tree.
                assert beginnings.setdefault(node, tuple(row[: t + 1])) == tuple(row[: t + 1])
                if node < forest * slots:
                    tree, slot = divmod(node, slots)
                    assert trees.depths[p, tree, slot] == t
                    seen = {int(j) + tree * slots for j in np.flatnonzero(visible[p, tree, slot])}
                    assert seen == {*path, node}
                else:
                    assert t == len(row) - 1, "a token that goes on must be fed"
                path.append(node)
        used = [node for node in beginnings if node < forest * slots]
        for node in set(range(forest * slots)) - set(used):
            tree, slot = divmod(node, slots)
            assert trees.tokens[p, node] == 0 and trees.parents[p, node] == -1 and trees.depths[p, tree, slot] == 0
            assert np.flatnonzero(visible[p, tree, slot]).tolist() == [slot]
        if not share:
            assert len(beginnings) == sum(map(len, rows))
        elif forest == 1:
            assert len(beginnings) == len(set(beginnings.values()))
        followed = {beginning[:-1] for beginning in beginnings.values()}
        assert share is False or {beginnings[node] for node in used} <= followed, "a slot that nothing follows"


@pytest.mark.parametrize("seed", range(40))
def test_trees_are_the_trie_of_the_completions(seed):
    random = np.random.default_rng(seed)
    samples, num_tokens = int(random.integers(1, 9)), int(random.integers(1, 10))
    ids = random.choice([0, 1, 2, 255, 256, 65_535, 65_536, 100_000], 3, replace=False)
    groups = [group_of(random, samples, num_tokens, ids) for _ in range(4)]
    last = (samples, max(num_tokens - 1, 1))
    rows = sort_rows(*arrays_of(groups, num_tokens))
    tries = [{tuple(row[: t + 1]) for row in group for t in range(len(row))} for group in groups]
    followed = [{one[:-1] for one in trie} - {()} for trie in tries]
    assert rows.distinct.tolist() == [len(trie) for trie in tries]
    assert rows.fed.tolist() == [len(one) for one in followed]
    for layout in [(1, max(*rows.fed.tolist(), 1)), (2, num_tokens * samples), (3, 2 * num_tokens), last]:
        for share in (True, False):
            if holds(sort_rows(*arrays_of(groups, num_tokens), share=share), [layout]).all():
                check(groups, num_tokens, layout, share=share)


def test_by_hand():
    """Two twins, their beginning, a branch, one token and none."""
    rows = [[5, 6, 7], [5, 6], [5, 6, 7], [5, 8, 9], [4], []]
    trees = pack(sort_rows(*arrays_of([rows], 3)), (1, 4))
    # 5, 6, 8 are fed, in this order; 4, 7 and 9 are not.
    assert trees.tokens[0, :3].tolist() == [5, 6, 8] and trees.depths[0, 0].tolist() == [0, 1, 1, 0]
    assert trees.ends[0, 0].tolist() == [3, 2, 3, 4] and trees.parents[0, :4].tolist() == [-1, 0, 0, -1]
    nodes = trees.node_of[0]
    assert nodes[1].tolist() == [0, 1, 0] and nodes[3, :2].tolist() == [0, 2]
    assert nodes[0].tolist() == nodes[2].tolist() and {nodes[0, 2], nodes[3, 2], nodes[4, 0]} <= set(range(4, 10))
    assert trees.parents[0, nodes[0, 2]] == 1 and trees.parents[0, nodes[3, 2]] == 2
    assert trees.parents[0, nodes[4, 0]] == -1 and trees.tokens[0, nodes[4, 0]] == 4


def test_a_layout_is_the_first_that_holds_every_group():
    rows = [[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9, 10]]  # 1 2 3 | 5, 7 8 9: seven slots
    groups = sort_rows(*arrays_of([rows, [[1]] * 3], 4))
    choices = [(1, 6), (2, 3), (1, 7), (2, 4), (3, 3)]
    assert holds(groups, choices).tolist() == [[False, False, True, True, True], [True, False, True, True, True]]
    assert smallest(holds(groups, choices), choices) == (1, 7)
    with pytest.raises(ValueError, match="none of the layouts"):
        smallest(holds(groups, choices[:2]), choices[:2])
    with pytest.raises(ValueError, match="does not hold"):
        pack(groups, (1, 6))


def test_two_trees_may_not_hold_what_one_does():
    """A long beginning that all share is twice in two trees; the last layout holds it in any case."""
    rows = [[*range(100, 115), branch, *range(branch, branch + 4)] for branch in range(0, 30, 5)]
    groups, choices = sort_rows(*arrays_of([rows], 20)), [(1, 40), (2, 24), (6, 19)]
    assert holds(groups, choices).tolist() == [[True, False, True]]


@pytest.mark.parametrize("samples", [1, 3, 8, 12])
@pytest.mark.parametrize("num_tokens", [1, 2, 20, 200, 700])
@pytest.mark.parametrize("prompt_tokens", [1, 46, 130, 556])
def test_layouts_are_few_rise_and_hold_everything(samples, num_tokens, prompt_tokens):
    found = layouts(samples, num_tokens, prompt_tokens=prompt_tokens)
    columns = [prompt_tokens + trees * slots for trees, slots in found]
    assert found[-1] == (samples, max(num_tokens - 1, 1)) and len(found) <= 16
    assert columns == sorted(set(columns))
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (2, samples, num_tokens)).astype(np.int32)
    full = sort_rows(tokens, np.ones(tokens.shape, bool), share=False)
    assert smallest(holds(full, found), found) == found[-1] or num_tokens == 1
    short = sort_rows(tokens, np.arange(num_tokens) < random.integers(0, num_tokens + 1, (2, samples, 1)))
    for layout, held in zip(found, holds(short, found).all(0), strict=True):
        if held:
            pack(short, layout)


def test_a_mask_with_a_gap_is_refused():
    mask = np.ones((1, 2, 3), bool)
    mask[0, 1, 1] = False
    with pytest.raises(ValueError, match="first to its last"):
        sort_rows(np.zeros((1, 2, 3), np.int32), mask)


def test_trees_of_a_large_step_take_milliseconds():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 49_160, (48, 8, 200)).astype(np.int32)
    tokens[:, 1::2, :100] = tokens[:, ::2, :100]
    mask = np.ones(tokens.shape, bool)
    choices = layouts(8, 200, prompt_tokens=130)

    def seconds():
        start = time.perf_counter()
        rows = sort_rows(tokens, mask)
        pack(rows, smallest(holds(rows, choices), choices))
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.05
