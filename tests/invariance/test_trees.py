"""A group's prompt and what its completions have in common are computed once; it learns what separate sequences would.

The reference runs every completion after a prompt of its own, in full, and shares nothing. One more loss on one more
mesh: `python -m pytest -m slow tests/invariance/test_trees.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.config import GRPOOptions
from jgrpo.core.logprobs import chunked_logprobs
from jgrpo.core.losses import on_policy_mask
from jgrpo.core.tree import layouts
from jgrpo.programs.steps import AVERAGED_OVER, Objective, _weigh, grpo_objective
from jgrpo.rollout import scoring
from jgrpo.rollout.scoring import pack_completions, reference_rows
from model_port import decoder
from model_port.batch import Completions
from tests.invariance.run import TRAINABLE, Run, gradient_error, make_targets
from tests.invariance.tiny import CONFIG, P, T, extend

G, TOLERANCE = 6, 1e-5
A, B, C, D, E, F = 21, 37, 5, 0, 90, 110  # F ends a completion
# Twins, beginnings of one another, branches at every depth, one token, none, the limit T, and a group of nothing.
GROUPS = [
    [[A, B, C, F], [A, B, C, F], [A, B], [A, B, D, E, F], [A], []],
    [[C, C, C, C, C, C], [C, C, C, C, C, D], [C, C, C, C, C, C], [D, C, C, F], [D], [D, C]],
    [[], [], [], [], [], []],
    [[F], [F], [F], [E], [D], [C]],
    [[A, B, C, D, E, F], [B, C, D, E, F], [C, D, E, F], [D, E, F], [E, F], [F]],
    [[A, A, A, A, A, A]] * 6,
    [[A, B, C, D, E, A], [A, B, C, D, E, B], [A, B, C, D, B, A], [A, B, C, A, B, D], [A, B, A, C, D, E], [A, C, F]],
    [[E], [E, E], [E, E, E], [E, E, E, E], [E, E, E, E, E], [E, E, E, E, E, E]],
]


@pytest.fixture(scope="module")
def out():
    """Those completions; their log-probs are somewhere near what a policy of 128 tokens gives."""
    tokens, mask = np.full((P, G, T), CONFIG.pad_token_id, np.int32), np.zeros((P, G, T), bool)
    for p, rows in enumerate(GROUPS):
        for g, row in enumerate(rows):
            tokens[p, g, : len(row)], mask[p, g, : len(row)] = row, True
    logp = np.where(mask, np.random.default_rng(3).normal(-5, 1, mask.shape), 0).astype(np.float32)
    return Completions(tokens=tokens, mask=mask, logp=logp)


def separate_sequences(ours: Run, out: Completions, targets, objective: Objective, micro_batches: int):
    """Return ({name: gradient}, metrics) of an update on P * G prompts, each with one completion behind it."""
    rows = jax.tree.map(jnp.asarray, extend(ours.batch, out.tokens))
    first = np.repeat(ours.batch.mask.sum(-1), G)[:, None] - 1 + np.arange(T)[None]
    weights, shares = _weigh(objective, targets, micro_batches)
    settings = {"chunk_tokens": 10_000, "temperature": objective.temperature, **objective.truncation}

    def loss(trained):
        model = ours.definition.bind(ours.frozen, trained)
        encoded = model.encode(rows.features, rows.lengths)
        hidden, _ = model.decoder.prefill(model.embed_prompts(rows, encoded), rows.mask)
        hidden = jnp.take_along_axis(hidden, first[:, :, None], axis=1)
        found = chunked_logprobs(hidden, out.tokens.reshape(P * G, T), model.policy_logits, **settings)
        logp, entropy = (x.reshape(P, G, T) for x in found)
        losses, metrics = objective.token_loss(logp, targets)
        sampled = on_policy_mask(targets.mask, targets.is_off_policy)
        drift = jnp.where(sampled, jnp.abs(logp - targets.old_logp), 0.0)
        metrics |= {"entropy": entropy, "logp_drift": drift}
        sums = {name: jnp.sum(shares[AVERAGED_OVER.get(name, "all")] * value) for name, value in metrics.items()}
        total = jnp.sum(weights * losses)
        return total, sums | {"loss": total, "logp_drift_max": drift.max()}

    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(ours.trained)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in gradient.values()))
    return gradient, metrics | {"grad_norm": norm, "skipped": 0.0, "empty": 0.0}


def grpo(**options):
    return grpo_objective(GRPOOptions(**{"num_samples": G, "temperature": 0.8, "beta": 0.1, **options}), T)


TRUNCATED = {"loss_type": "dr_grpo", "kl": "k1", "importance": "sequence", "top_p": 0.8, "top_k": 30}
MIXED = {"loss_type": "grpo", "mixed_policy": True, "off_policy_shaping": 0.1, "delta": 2.0}


@pytest.mark.parametrize(
    ("objective", "layout", "options"),
    [
        (grpo(), (1, 20), {}),
        (grpo(**TRUNCATED), (1, 32), {"mesh": (2, 2, 2), "remat": "full"}),
        (grpo(loss_type="bnpo"), (6, 5), {"mesh": (1, 4, 2), "micro_batches": 2}),
        pytest.param(
            grpo(loss_type="cispo", epsilon_high=2.0, kl="k2"),
            (3, 8),
            {"mesh": (8, 1, 1), "logprob_chunk": 24},
            marks=pytest.mark.slow,
        ),
        (grpo(**MIXED), (2, 12), {"trainable": (*TRAINABLE, "encoder"), "remat": "dots", "micro_batches": 4}),
    ],
    ids=["dapo", "truncated", "bnpo", "cispo", "mixed"],
)
def test_an_update_on_trees_is_one_on_separate_sequences(out, objective, layout, options, monkeypatch):
    monkeypatch.setattr(decoder, "HALVED", 20)  # two of the layouts here; without it none is that large
    ours = Run(objective=objective, **options)
    # One shares nothing, and one has references as the last of each group.
    changes = {"is_off_policy": reference_rows((P, G))} if "trainable" in options else {"share": layout != (6, 5)}
    # Learnt from are all but a row that was cut at the limit, and a whole group.
    learnt = out.mask.copy()
    learnt[1, 0], learnt[3] = False, False
    targets = make_targets(out, mask=learnt, layout=layout, **changes)
    gradient, metrics = ours.gradient(targets)
    expected, expected_metrics = separate_sequences(ours, out, targets, objective, options.get("micro_batches", 1))
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=TOLERANCE, atol=1e-6, err_msg=name)
    error, name = gradient_error(gradient, expected)
    assert error < TOLERANCE, f"{name}: {error:.1e} of its largest component"


def test_log_probs_do_not_depend_on_the_layout(run, out):
    """A completion's are the same whatever the size, the number and the sharing of trees; only rounding differs."""
    expected = run.score(out.tokens, mask=out.mask, layout=(6, 5), share=False)
    for layout in ((1, 20), (1, 29), (2, 12), (4, 9), (6, 5)):
        found = run.score(out.tokens, mask=out.mask, layout=layout)
        np.testing.assert_allclose(found[out.mask], expected[out.mask], atol=1e-5)
        assert np.isfinite(found).all()
    # Of completions with the same beginning they are the same to the bit.
    np.testing.assert_array_equal(found[0, 0], found[0, 1])


def test_all_processes_take_the_layout_that_the_largest_group_of_any_needs(run, out, monkeypatch):
    """Two processes with a prompt each: one needs few slots, the other more than one tree has."""
    prompts = jax.tree.map(lambda x: x[:1], run.batch)
    tokens = np.zeros((2, G, 100), np.int32)
    tokens[1] = np.arange(G * 100).reshape(G, 100)
    mask = np.ones(tokens.shape, bool)
    mask[0, :, 3:] = False
    seen = {}

    def record(name):
        def gather(tree, mesh):
            seen[name] = tree
            return tree

        return gather

    alone = []
    for process in range(2):
        monkeypatch.setattr(scoring, "gather", record(process))
        alone.append(pack_completions(tokens[process, None], mask[process, None], prompts, run.mesh))
    shapes = [trees.ends.shape[1:] for trees, _ in alone]
    choices = layouts(G, 100, prompt_tokens=prompts.tokens.shape[1])
    assert shapes == [choices[0], choices[-1]]
    both = jax.tree.map(lambda *rows: np.concatenate(rows), *seen.values())
    monkeypatch.setattr(scoring, "gather", lambda tree, mesh: both)
    for process in range(2):
        trees, metrics = pack_completions(tokens[process, None], mask[process, None], prompts, run.mesh)
        assert trees.ends.shape[1:] == choices[-1] == (metrics["tree/trees"], metrics["tree/slots"])
        # Of both groups: (3 + 600) tokens less what is shared, two slots and 594 of 2 x 594.
        assert metrics["padding/nodes"] == pytest.approx(1 - (2 + 6 * 99) / (2 * 6 * 99))
        assert metrics["tree/tokens_per_node"] == pytest.approx((6 * 3 + 600) / (3 + 600))
        assert metrics["padding/prompts"] == pytest.approx(1 - prompts.mask.mean())
