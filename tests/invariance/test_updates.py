"""What one rollout is used for: several passes and minibatches, rows that were not sampled, rows that do not count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgrpo.programs.steps import apply_updates
from jgrpo.rollout.scoring import advantages, reference_rows
from jgrpo.runtime.rows import fetch, place
from tests.invariance.run import Run, make_targets
from tests.invariance.tiny import G, P, T

RATE = 0.01


@pytest.fixture(scope="module")
def ours():
    """A policy whose updates move it; Adam's momentum would move it without a gradient, too."""
    return Run(optimiser=optax.adam(RATE), trainable=("lora",))


@pytest.fixture(scope="module")
def on_policy(out):
    return make_targets(out, old_logp=out.logp, ref_logp=out.logp)


def start(ours, targets):
    """Return what apply_updates takes, with a state of its own."""
    state = ours.programs.init(jax.tree.map(lambda leaf: leaf.copy(), ours.trained))
    batch = place(ours.batch, ours.mesh)
    return ours.programs, state, ours.frozen, batch, ours.encode(), place(targets, ours.mesh)


def assert_close(ours, theirs):
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_second_pass_is_off_policy(ours, on_policy):
    """Its ratio is against the policy that sampled, not against the one before the update."""
    arrays = start(ours, on_policy)
    state, first = apply_updates(*arrays)
    assert abs(first["ratio"] - 1) < 1e-4 and first["logp_drift_max"] < 1e-4 and first["clip_region"] == 0
    _, second = apply_updates(arrays[0], jax.tree.map(jnp.copy, state), *arrays[2:])
    assert abs(second["ratio"] - 1) > 1e-3 and second["logp_drift"] > 1e-3
    _, both = apply_updates(*start(ours, on_policy), iterations=2)
    for name in ("ratio", "logp_drift", "loss", "grad_norm", "kl", "entropy"):
        np.testing.assert_allclose(both[name], (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(both["logp_drift_max"], max(first["logp_drift_max"], second["logp_drift_max"]))


def test_minibatches_are_updates_on_every_other_prompt(ours, on_policy):
    """Two passes of two minibatches are four updates; old log-probs stay those of the rollout."""
    found, metrics = apply_updates(*start(ours, on_policy), iterations=2, minibatches=2)
    programs, state, frozen, *_ = start(ours, on_policy)
    encoded, losses = np.asarray(ours.encode()), []
    for part in (0, 1, 0, 1):
        piece = jax.tree.map(lambda x, part=part: np.asarray(x)[part::2], (ours.batch, encoded, on_policy))
        state, each = programs.update(state, frozen, *place(piece, ours.mesh))
        losses.append(float(each["loss"]))
    assert_close(found.params, state.params)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert int(found.opt_state[0].count) == 4


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_shares_leave_rows_where_they_are(ours, mesh):
    laid_out = Run(mesh=mesh)
    rows = place({"row": np.arange(P), "table": np.arange(P * 3).reshape(P, 3)}, laid_out.mesh)
    for part in range(2):
        share = laid_out.programs.share(rows, part, parts=2)
        np.testing.assert_array_equal(fetch(share["row"]), np.arange(P)[part::2])
        assert share["row"].sharding == rows["row"].sharding and share["table"].shape == (P // 2, 3)
        for piece, whole in zip(share["row"].addressable_shards, rows["row"].addressable_shards, strict=True):
            assert piece.device == whole.device and set(np.asarray(piece.data)) <= set(np.asarray(whole.data))
    np.testing.assert_array_equal(fetch(rows["row"]), np.arange(P))


def test_an_update_without_tokens_changes_nothing(ours, on_policy):
    """It is no failure either; in minibatches the metrics are those of the update that learnt something."""
    arrays = start(ours, on_policy)
    state, _ = apply_updates(*arrays)
    before = jax.device_get(state)
    nothing = place(dataclasses.replace(on_policy, mask=np.zeros((P, G, T), bool)), ours.mesh)
    state, metrics = apply_updates(arrays[0], state, *arrays[2:5], nothing)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    assert (metrics["empty"], metrics["skipped"], metrics["loss"], metrics["grad_norm"]) == (1, 0, 0, 0)
    assert all(np.isfinite(value) for value in metrics.values())

    mask = on_policy.mask & (np.arange(P) % 2 == 0)[:, None, None]
    half = dataclasses.replace(on_policy, mask=mask)
    _, metrics = apply_updates(*start(ours, half), minibatches=2)
    assert metrics["empty"] == 1 and abs(metrics["ratio"] - 1) < 1e-4 and metrics["entropy"] > 1


def test_a_bad_update_is_counted_beside_good_ones(ours, on_policy):
    values = on_policy.advantage.copy()
    values[0] = np.nan
    _, metrics = apply_updates(*start(ours, dataclasses.replace(on_policy, advantage=values)), minibatches=2)
    assert metrics["skipped"] == 1 and metrics["empty"] == 0 and np.isnan(metrics["loss"])


def test_references_weigh_as_the_policy_believes_in_them(run, out):
    """Mixed policy through the programs: value pi A, gradient pi A grad log pi, joint normalisation, no clip."""
    logp = run.score(out.tokens)  # as the reference's, too: the KL and its gradient are 0
    values = advantages(np.tile([0.0] * (G - 1) + [1.0], (P, 1)), "group")
    np.testing.assert_allclose(values[:, -1], (G - 1) / np.sqrt(G), atol=1e-3)
    np.testing.assert_allclose(values[:, 0], -1 / np.sqrt(G), atol=1e-3)
    junk = np.where(reference_rows((P, G))[:, :, None], 7.0, out.logp).astype(np.float32)
    mixed = make_targets(out, advantage=values, old_logp=junk, ref_logp=logp, is_off_policy=reference_rows((P, G)))
    _, metrics = run.gradient(mixed)
    count, last = out.mask.sum(), out.mask[:, -1]
    expected = np.where(out.mask[:, :-1], values[:, :-1, None], 0).sum()
    expected += np.where(last, np.exp(logp[:, -1]) * values[:, -1:], 0).sum()
    np.testing.assert_allclose(metrics["loss"], -expected / count, rtol=1e-4)
    np.testing.assert_allclose(metrics["mixed/reference_ratio"], np.exp(logp[:, -1])[last].mean(), rtol=1e-4)
    # Its drift and ratio would be far from 0 and 1 with the junk.
    assert metrics["logp_drift_max"] < 1e-4 and abs(metrics["ratio"] - 1) < 1e-4

    # One token of each reference: its gradient is that of a sampled token at ratio 1 with the advantage pi A.
    one = out.mask & reference_rows((P, G))[:, :, None] & (np.arange(T) == 0)
    gradient, _ = run.gradient(dataclasses.replace(mixed, mask=one))
    sampled = dataclasses.replace(
        mixed,
        mask=one,
        old_logp=logp,
        advantage=(values * np.exp(logp[:, :, 0])).astype(np.float32),
        is_off_policy=np.zeros((P, G), bool),
    )
    as_sampled, _ = run.gradient(sampled)
    for name in gradient.keys() - {"projector.layers.cross_attn.key.bias", "projector.layers.self_attn.key.bias"}:
        scale = np.abs(as_sampled[name]).max()
        np.testing.assert_allclose(gradient[name], as_sampled[name], atol=1e-4 * scale + 1e-9, err_msg=name)

    # All rewards equal: nothing to learn.
    equal, _ = run.gradient(dataclasses.replace(mixed, advantage=advantages(np.ones((P, G)), "group")))
    assert optax.tree.norm(equal) < 1e-6 < optax.tree.norm(gradient)
