"""Ten faults found in other systems, and the tests that keep them out of this one. Those without a home are below.

1.  Logits not divided by logits_scaling: parity/test_decoder test_logits_scaling_divides_the_logits, and
    test_generation test_logits_scaling_reaches_rollout_and_scoring.
2.  Audio heard by generation and not by the loss: below.
3.  BatchNorm by batch statistics, dropout in training: test_padding test_other_batch_mates and
    test_stored_statistics_and_no_dropout.
4.  No gradient on the end token: test_generation test_masks_end_with_the_end_token and
    test_the_end_token_has_gradient; core/test_losses test_the_end_of_sequence_token_is_trained.
5.  The same noise at every step: below.
6.  The clip inverted for negative advantages, iterations that are never read: below; core/test_losses
    test_clip_sides_by_hand.
7.  Audio paired with other rows: test_padding test_swapping_prompts_swaps_their_groups and
    test_swapping_two_clips_swaps_what_is_heard; data/test_pipeline test_rows_belong_together.
8.  Sampling from other logits than are trained on: test_generation
    test_log_probs_of_rollout_scoring_and_a_full_pass_agree and
    test_the_drift_between_rollout_and_update_is_a_metric.
9.  A loss that depends on micro-batches or on the mesh: test_mesh; core/test_losses
    test_loss_and_gradient_do_not_depend_on_micro_batches.
10. Lengths in characters, zero variance by the mean, a standard deviation that is not the group's: below;
    core/test_advantages test_zero_variance_looks_at_spread_not_at_the_mean and
    test_each_group_is_divided_by_its_own_deviation.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jgrpo.rollout.metrics import rollout_metrics
from jgrpo.rollout.scoring import advantages, step_keys
from tests.invariance.run import TRAINABLE, Run, gradient_error, make_targets
from tests.invariance.tiny import CONFIG, PROMPTS, G, P, make_batch


def silenced(rows):
    """The batch with the clips of some rows set to zero."""
    batch = make_batch(CONFIG, PROMPTS)
    features = batch.features.copy()
    features[rows] = 0
    return dataclasses.replace(batch, features=features)


@pytest.mark.parametrize("row", range(P))
def test_2_the_gradient_hears_the_audio_of_every_prompt(run, targets, gradient, row):
    deaf, metrics = run.gradient(targets, silenced([row]))
    assert abs(metrics["loss"] - gradient[1]["loss"]) > 1e-4
    assert gradient_error(deaf, gradient[0])[0] > 0.01


def test_2_a_trained_encoder_hears_it_too(out, targets, gradient):
    """The encoder runs again inside the update then, and gives the loss that its cached output gives."""
    ours = Run(trainable=(*TRAINABLE, "encoder"), micro_batches=2)
    found, metrics = ours.gradient(targets, encoded=jax.numpy.zeros_like(ours.encode()))
    np.testing.assert_allclose(metrics["loss"], gradient[1]["loss"], rtol=1e-5)
    assert gradient_error({name: found[name] for name in gradient[0]}, gradient[0])[0] < 1e-5
    encoder = {name: value for name, value in found.items() if name.startswith("encoder.")}
    assert len(encoder) > 30 and not encoder.keys() & ours.definition.stats
    # The reference, too, hears with its own encoder and not with what the trained one made of the clips.
    deaf = ours.score(out.tokens, encoded=jax.numpy.zeros_like(ours.encode()))
    np.testing.assert_allclose(deaf, ours.score(out.tokens), atol=1e-5)
    silent, _ = ours.gradient(targets, silenced(range(P)))
    for part in ("input_linear", "layers.attn.to_kv", "layers.conv.depth_conv"):
        name = f"encoder.{part}.kernel"
        assert np.abs(encoder[name]).max() > 1e-4, name
        assert np.abs(encoder[name] - silent[name]).max() > 1e-4, name


def test_5_steps_have_noise_of_their_own(run, out, targets):
    """With a learning rate of 0 the policy stays, and still every prompt's samples change from step to step."""
    state, _ = run.update(targets)
    jax.tree.map(np.testing.assert_array_equal, state.params, jax.device_get(run.trained))
    again, later = (jax.device_get(run.rollout(step=step)) for step in (0, 1))
    np.testing.assert_array_equal(again.tokens, out.tokens)
    np.testing.assert_array_equal(again.logp, out.logp)
    assert (later.tokens != out.tokens).any((1, 2)).all()
    keys = [step_keys(seed, step, num_prompts=P, num_samples=G) for seed in range(3) for step in range(3)]
    assert len(np.unique(np.reshape([jax.random.key_data(k) for k in keys], (9 * P * G, -1)), axis=0)) == 9 * P * G


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"), [(1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 0.5, False), (-1.0, 1.5, True)]
)
def test_6_the_clip_stops_what_has_gone_far_enough(run, out, advantage, ratio, moves):
    logp = run.score(out.tokens)
    old = (logp - np.log(ratio)).astype(np.float32)
    values = np.full((P, G), advantage, np.float32)
    found, metrics = run.gradient(make_targets(out, advantage=values, old_logp=old, ref_logp=logp))
    np.testing.assert_allclose(metrics["clip_region"], not moves, atol=1e-6)
    assert (optax.tree.norm(found) > 0.01) == moves
    bound = ratio if moves else 1 + 0.2 * advantage
    np.testing.assert_allclose(metrics["loss"], -advantage * bound, rtol=1e-5)


def test_6_a_second_update_on_one_rollout_is_off_policy(out):
    ours = Run(optimiser=optax.sgd(0.01), trainable=("lora",))
    targets = make_targets(out, old_logp=out.logp, ref_logp=out.logp)
    state, first = ours.update(targets)
    assert first["logp_drift_max"] < 1e-4 and first["kl"] < 1e-6
    _, second = ours.update(targets, state=jax.tree.map(jax.numpy.asarray, state))
    assert second["logp_drift_max"] > 1e-2 and second["kl"] > 1e-4
    assert second["loss"] < first["loss"] - 1e-3


def test_10_lengths_are_tokens_and_groups_keep_their_own_deviation(out):
    rewards = np.array([[0.3, 0.3, 0.3], [0.1, 0.2, 0.3], [0.0, 0.5, 1.0]])
    lengths = np.array([[2, 4, 6], [1, 1, 1], [3, 3, 6]])
    metrics = rollout_metrics(rewards, {}, lengths, np.ones((3, G), bool))
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (1, 6)
    assert metrics["completions/mean_length"] == 3.0 and metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    values = advantages(rewards, "group")
    np.testing.assert_allclose(values[0], 0)
    np.testing.assert_allclose(values[1], [-1, 0, 1], atol=2e-3)
    np.testing.assert_allclose(values[2], [-1, 0, 1], atol=2e-3)
