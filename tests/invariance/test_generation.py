"""What a rollout promises: log-probs are those of the distribution drawn from, samples differ, and it stops early.

Fault 1 (logits_scaling), fault 4 (EOS in the mask), fault 8 (rollout against scoring), and the ban on `<|audio|>`.
"""

import dataclasses
import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model_port.generate import cache_sizes, generate, sample_completions
from model_port.params import split_model
from model_port.sampling import row_keys
from model_port.weights.convert import build_model
from tests.invariance.run import TEMPERATURE, Run, make_targets
from tests.invariance.tiny import CONFIG, PROMPTS, G, P, T, at, full_forward, make_batch, make_model

EOS = np.array(CONFIG.eos_token_ids)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def whole(model, run, out):
    """Log-probs [P, G, T, V] at the training temperature from one pass over each whole sequence."""
    return full_forward(model, run.batch, out.tokens, temperature=TEMPERATURE)


def test_log_probs_of_rollout_scoring_and_a_full_pass_agree(run, out, whole):
    """Fault 8: what the policy is trained on is what it sampled from."""
    expected = at(whole, out.tokens)
    assert expected[out.mask].min() < -3
    np.testing.assert_allclose(out.logp[out.mask], expected[out.mask], atol=1e-4)
    np.testing.assert_allclose(run.score(out.tokens)[out.mask], expected[out.mask], atol=1e-4)


def test_the_drift_between_rollout_and_update_is_a_metric(run, out, targets):
    """Fault 8, where a run shows it: 0 on policy, and the largest difference otherwise."""
    _, metrics = run.gradient(dataclasses.replace(targets, old_logp=out.logp))
    assert metrics["logp_drift_max"] < 1e-4 and abs(metrics["ratio"] - 1) < 1e-4
    off = out.logp.copy()
    off[3, 1, 0] -= 0.5
    _, metrics = run.gradient(dataclasses.replace(targets, old_logp=off))
    np.testing.assert_allclose(metrics["logp_drift_max"], 0.5, atol=1e-4)


def test_masks_end_with_the_end_token(out):
    """Fault 4: the end token counts, nothing after it does, and every sequence ends there or at the last position."""
    for tokens, mask, logp in zip(*(x.reshape(P * G, T) for x in (out.tokens, out.mask, out.logp)), strict=True):
        length = mask.sum()
        ends = np.isin(tokens[:length], EOS)
        assert mask[:length].all() and not ends[:-1].any() and (ends[-1] or length == T)
        assert (tokens[length:] == CONFIG.pad_token_id).all() and not logp[length:].any()
        assert (logp[:length] < 0).all()


def test_the_end_token_has_gradient(run, out):
    """Fault 4: a loss on the end tokens alone moves the policy, and leaving them out is another gradient."""
    last = out.mask & ~np.pad(out.mask[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    end = last & np.isin(out.tokens, EOS)
    assert end.sum() >= 3
    for mask in (end, out.mask & ~end):
        targets = make_targets(out, mask=mask, old_logp=out.logp, advantage=np.ones((P, G), np.float32))
        gradient, metrics = run.gradient(targets)
        assert metrics["loss"] < -0.5
        assert all(np.abs(gradient[name]).max() > 1e-3 for name in gradient if "lora" in name or "gate_proj" in name)


def test_samples_of_a_group_differ_and_follow_their_keys(run, out):
    groups = [{tuple(row) for row in group} for group in out.tokens]
    assert sum(map(len, groups)) >= P * G - 2
    again = run.rollout(keys=row_keys(jax.random.key(1), num_prompts=P, num_samples=G))
    assert (np.asarray(again.tokens) != out.tokens).any((1, 2)).all()


def test_top_p_draws_from_the_nucleus_and_reports_its_log_probs(model, run):
    out = jax.device_get(run.rollout(top_p=0.6))
    whole = full_forward(model, run.batch, out.tokens, temperature=TEMPERATURE)
    ordered = -np.sort(-np.exp(whole), axis=-1)
    kept = (np.cumsum(ordered, axis=-1) - ordered < 0.6).sum(-1)
    rank = (whole > at(whole, out.tokens)[..., None]).sum(-1)
    assert (rank < kept)[out.mask].all() and kept[out.mask].max() > 3
    mass = np.take_along_axis(np.cumsum(ordered, axis=-1), kept[..., None] - 1, axis=-1)[..., 0]
    expected = at(whole, out.tokens) - np.log(mass)
    np.testing.assert_allclose(out.logp[out.mask], expected[out.mask], atol=1e-4)


def test_one_token(model, run, out):
    """T = 1: the prompt's last state predicts it; there is no decoding step."""
    one = generate(model, run.batch, key=jax.random.key(0), max_new_tokens=1, num_samples=2)
    assert one.tokens.shape == (P, 2, 1) and np.asarray(one.mask).all()
    expected = at(full_forward(model, run.batch, one.tokens), one.tokens)
    np.testing.assert_allclose(one.logp, expected, atol=1e-4)
    whole = full_forward(model, run.batch, out.tokens, temperature=TEMPERATURE)
    scored = run.score(out.tokens[:, :, :1])
    np.testing.assert_allclose(scored, at(whole, out.tokens)[:, :, :1], atol=1e-4)


@pytest.mark.parametrize("few", [4, 2], ids=["all go on", "one goes on"])
def test_stages_of_the_cache_and_few_samples_change_nothing(run, out, monkeypatch, few):
    """The cache grows from 2 to 3 and 5 slots, and where one sample of three goes on in any group the rest is left."""
    # As an attribute of the package, `generate` is the function.
    module = importlib.import_module("model_port.generate")
    monkeypatch.setattr(module, "FIRST_STAGE", 2)
    monkeypatch.setattr(module, "FEW", few)
    assert cache_sizes(T, unrolled=True) == [2, 3, 5]
    samples = jax.device_get(Run(rollout_layers="unrolled").rollout())
    np.testing.assert_array_equal(samples.tokens, out.tokens)
    np.testing.assert_array_equal(samples.mask, out.mask)
    np.testing.assert_allclose(samples.logp, out.logp, atol=1e-5)


def test_where_few_samples_go_on_those_are_decoded_alone(model, run, monkeypatch):
    """Of eight samples of a group at most two go on after the first stage; every one is as it would be anyway."""
    module = importlib.import_module("model_port.generate")
    config = dataclasses.replace(CONFIG, eos_token_ids=tuple(range(0, 128, 4)), pad_token_id=1)
    other = build_model(config, dict(split_model(model)[1]))
    keys = row_keys(jax.random.key(0), num_prompts=P, num_samples=8)
    arrays = jax.tree.map(jnp.asarray, run.batch), jnp.asarray(run.encode()), keys
    found = {}
    for few, shapes in ((9, [(P, 8)]), (4, [(P, 8), (P, 2)])):
        monkeypatch.setattr(module, "FEW", few)
        seen, plain = set(), module.sample

        def counted(keys, *args, plain=plain, seen=seen, **options):
            jax.debug.callback(lambda shape=keys.shape: seen.add(shape))
            return plain(keys, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, "sample", counted)
            decode = jax.jit(partial(sample_completions, other, num_tokens=40, temperature=1.0, unrolled=True))
            found[few] = jax.device_get(decode(*arrays))
            jax.effects_barrier()
        assert sorted(seen, reverse=True) == shapes
    lengths = found[4].mask.sum(-1)
    assert lengths.max() > 12 and len(set(lengths.reshape(-1).tolist())) > 5
    np.testing.assert_array_equal(found[4].tokens, found[9].tokens)
    np.testing.assert_array_equal(found[4].mask, found[9].mask)
    np.testing.assert_allclose(found[4].logp, found[9].logp, atol=1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "unrolled", "sizes"),
    [
        (1, True, [1]),
        (2, True, [1]),
        (33, True, [32]),
        (64, True, [32, 63]),
        (200, False, [199]),
        (200, True, [25, 50, 100, 199]),
    ],
)
def test_stages_of_the_cache(num_tokens, unrolled, sizes):
    assert cache_sizes(num_tokens, unrolled=unrolled) == sizes


def test_a_cache_of_less_precision_is_near_but_another_policy(run, out):
    samples = jax.device_get(Run(rollout_cache="bfloat16").rollout())
    first_tokens = (samples.tokens[:, :, :2] == out.tokens[:, :, :2]).all(-1)
    drift = np.abs(samples.logp[:, :, 1] - out.logp[:, :, 1])[first_tokens]
    assert first_tokens.mean() > 0.9 and 1e-5 < drift.max() < 0.05


def test_decoding_stops_when_all_samples_have_ended(model, run, monkeypatch):
    """Half of the vocabulary ends a sequence, so that few of the 64 positions are ever computed."""
    # As an attribute of the package, `generate` is the function.
    module = importlib.import_module("model_port.generate")
    draws, plain = [], module.sample

    def counted(*args, **options):
        jax.debug.callback(lambda: draws.append(1))
        return plain(*args, **options)

    monkeypatch.setattr(module, "sample", counted)
    config = dataclasses.replace(CONFIG, eos_token_ids=tuple(range(0, 128, 2)), pad_token_id=1)
    other = build_model(config, dict(split_model(model)[1]))
    keys = row_keys(jax.random.key(0), num_prompts=P, num_samples=G)
    decode = jax.jit(partial(sample_completions, other, num_tokens=64, temperature=1.0, top_p=1.0))
    out = jax.device_get(decode(jax.tree.map(jnp.asarray, run.batch), jnp.asarray(run.encode()), keys))
    jax.effects_barrier()
    lengths = out.mask.sum(-1)
    assert 1 < lengths.max() < 40 and len(draws) == lengths.max()
    assert (out.tokens[~out.mask] == 1).all() and not out.logp[~out.mask].any()
    ends = np.take_along_axis(out.tokens, lengths[..., None] - 1, axis=-1)
    assert (ends % 2 == 0).all()


def test_the_audio_token_is_never_written():
    """The most probable first token is declared to be `<|audio|>`; sampling, scoring and update all renormalise."""
    config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, logits_scaling=0.3))
    batch = make_batch(config, PROMPTS)
    first = np.exp(full_forward(make_model(config), batch, np.zeros((P, 1, 1), np.int32))[:, 0, 0])
    audio = int(first.mean(0).argmax())
    assert first[:, audio].max() > 0.8
    config = dataclasses.replace(config, audio_token_id=audio)
    banned, model = Run(config, batch=make_batch(config, PROMPTS)), make_model(config)
    sampled, greedy = (jax.device_get(banned.rollout(temperature=t)) for t in (TEMPERATURE, 0.0))
    assert audio not in sampled.tokens and audio not in greedy.tokens
    expected = at(full_forward(model, banned.batch, sampled.tokens, temperature=TEMPERATURE), sampled.tokens)
    np.testing.assert_allclose(sampled.logp[sampled.mask], expected[sampled.mask], atol=1e-4)
    np.testing.assert_allclose(banned.score(sampled.tokens)[sampled.mask], expected[sampled.mask], atol=1e-4)
    _, metrics = banned.gradient(make_targets(sampled, old_logp=sampled.logp))
    assert metrics["logp_drift_max"] < 1e-4


def test_logits_scaling_reaches_rollout_and_scoring(model, run, out, whole):
    """Fault 1: twice the scaling is half the logits, in every program; greedy decoding could not tell."""
    decoder = dataclasses.replace(CONFIG.decoder, logits_scaling=2 * CONFIG.decoder.logits_scaling)
    scaled = Run(dataclasses.replace(CONFIG, decoder=decoder))
    expected = at(full_forward(model, run.batch, out.tokens, temperature=2 * TEMPERATURE), out.tokens)
    assert np.abs(expected - at(whole, out.tokens)).max() > 0.5
    np.testing.assert_allclose(scaled.score(out.tokens)[out.mask], expected[out.mask], atol=1e-4)
    sampled = jax.device_get(scaled.rollout())
    logp = at(full_forward(model, run.batch, sampled.tokens, temperature=2 * TEMPERATURE), sampled.tokens)
    np.testing.assert_allclose(sampled.logp[sampled.mask], logp[sampled.mask], atol=1e-4)
