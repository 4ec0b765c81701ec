import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.core.advantages import group_advantages
from jgrpo.core.losses import IMPORTANCE, policy_loss, sft_token_loss, token_loss, token_weights
from model_port.errors import UserError
from tests.compiling import compiled_quickly

P, G, T = 3, 5, 7
LENGTHS = np.array([[7, 3, 0, 1, 5], [2, 7, 4, 6, 0], [1, 2, 3, 5, 7]])
LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo")
OPTIONS = {"epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": 11}
# Without and with what bounds or reshapes the ratio further; the ratios of make_inputs go up to 1.65.
EXTRAS = ({"delta": None, "off_policy_shaping": 0.0}, {"delta": 1.4, "off_policy_shaping": 0.1})
SCALES = ("group", "batch", "none")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling so many small programs takes longer than running them."""
    with compiled_quickly():
        yield


def extras_for(loss_type, extras):
    """cispo takes no delta."""
    return {**extras, "delta": None if loss_type == "cispo" else extras["delta"]}


def scaled(rewards, scale):
    """The definition of each scale, group by group."""
    centred = np.array([group - sum(group) / G for group in rewards])
    if scale == "group":
        return np.array([group / (np.sqrt(np.sum(group**2) / (G - 1)) + 1e-4) for group in centred])
    spread = np.sqrt(np.sum((rewards - rewards.sum() / (P * G)) ** 2) / (P * G - 1))
    return centred / (spread + 1e-4) if scale == "batch" else centred


def make_inputs(seed=0):
    """Ratios inside and on both sides outside the clip, both signs of the advantage, ragged rows, two of them empty."""
    rng = np.random.default_rng(seed)
    logp = -rng.gamma(1.0, 1.0, (P, G, T))
    old_logp = logp + rng.uniform(-0.5, 0.5, (P, G, T))
    ref_logp = logp + rng.uniform(-0.7, 0.7, (P, G, T))
    advantage = rng.normal(size=(P, G))
    mask = np.arange(T) < LENGTHS[..., None]
    off_policy = np.zeros((P, G), bool)
    off_policy[:, -1] = True
    return logp, old_logp, ref_logp, advantage, mask, off_policy


def sequence_weight(loss_type, length, mask):
    """The weight of one token of a sequence of this length, from the definition of each loss."""
    if loss_type == "grpo":
        return 1 / (P * G * length)
    if loss_type == "dr_grpo":
        return 1 / (P * G * OPTIONS["max_completion_length"])
    return 1 / mask.sum()


def reference(inputs, *, loss_type, importance, kl, beta, off_policy, delta=None, off_policy_shaping=0.0):
    """Loss and its gradient in logp, token by token, each from its own closed form."""
    logp, old_logp, ref_logp, advantage, mask, is_off = inputs
    low, high = OPTIONS["epsilon_low"], OPTIONS["epsilon_high"]
    loss, gradient = 0.0, np.zeros_like(logp)
    for p, g in itertools.product(range(P), range(G)):
        n, a = int(mask[p, g].sum()), advantage[p, g]
        off = off_policy and is_off[p, g]
        behaviour = np.zeros(T) if off else old_logp[p, g]
        for t in range(n):
            log_ratio = logp[p, g, :n] - behaviour[:n]
            ratio = np.exp(log_ratio[t] if importance == "token" else log_ratio.mean())
            shaped, its_slope = ratio, ratio  # the slope is d/dlogp
            if off and off_policy_shaping:
                shaped = ratio / (ratio + off_policy_shaping)
                its_slope = ratio * off_policy_shaping / (ratio + off_policy_shaping) ** 2
            if loss_type == "cispo":
                weight = shaped if off else min(ratio, high)
                value, slope = weight * a * logp[p, g, t], weight * a
            elif off:
                value, slope = shaped * a, its_slope * a
            else:
                free = ratio if delta is None else min(ratio, delta)
                clipped = min(max(ratio, 1 - low), 1 + high)
                value = min(free * a, clipped * a)
                slope = 0.0 if clipped * a < free * a or free < ratio else ratio * a
            d = ref_logp[p, g, t] - logp[p, g, t]
            divergence = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}[kl]
            divergence_slope = {"k1": 1.0, "k2": -d, "k3": 1 - np.exp(d)}[kl]
            weight = sequence_weight(loss_type, n, mask)
            loss += weight * (-value + beta * divergence)
            gradient[p, g, t] = weight * (-slope + beta * divergence_slope)
    return loss, gradient


@functools.partial(jax.jit, static_argnames=[*OPTIONS, *EXTRAS[0], "loss_type", "importance", "kl", "beta"])
def loss_and_gradient(logp, *others, **options):
    """One compilation per set of options, shared by the tests."""
    return jax.value_and_grad(lambda logp: policy_loss(logp, *others, **options), has_aux=True)(logp)


def run(inputs, *, off_policy, x64=False, **options):
    """Loss, gradient and metrics on the host; the arrays are float32, or float64 if asked for."""
    *floats, mask, is_off = inputs
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        dtype = jnp.float64 if x64 else jnp.float32
        arrays = [None if x is None else jnp.asarray(x, dtype) for x in floats]
        off_rows = jnp.asarray(is_off if off_policy else np.zeros(mask.shape[:2], bool))
        (loss, metrics), gradient = loss_and_gradient(*arrays, jnp.asarray(mask), off_rows, **{**OPTIONS, **options})
        return float(loss), np.asarray(gradient), {name: float(x) for name, x in metrics.items()}


@pytest.mark.parametrize("extras", EXTRAS, ids=("plain", "bounded"))
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_value_and_gradient_match_the_reference(loss_type, importance, kl, extras):
    *before, rewards, mask, is_off = make_inputs()
    options = {"loss_type": loss_type, "importance": importance, "kl": kl, "beta": 0.1}
    for scale, off_policy in itertools.product(SCALES, (False, True)):
        inputs = (*before, scaled(rewards, scale), mask, is_off)
        settings = {**options, **extras_for(loss_type, extras), "off_policy": off_policy}
        loss, gradient = reference(inputs, **settings)
        actual = (*before, group_advantages(rewards, scale), mask, is_off)
        ours, our_gradient, _ = run(actual, x64=True, **settings)
        assert ours == pytest.approx(loss, rel=1e-9)
        np.testing.assert_allclose(our_gradient, gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("extras", EXTRAS, ids=("plain", "bounded"))
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_float32_keeps_five_digits(loss_type, importance, extras):
    inputs = make_inputs()
    options = {"loss_type": loss_type, "importance": importance, "kl": "k3", "beta": 0.1, "off_policy": True}
    options |= extras_for(loss_type, extras)
    loss, gradient = reference(inputs, **options)
    ours, our_gradient, _ = run(inputs, **options)
    # Terms of both signs are added: the error is that of the largest, not of the sum.
    assert ours == pytest.approx(loss, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(our_gradient, gradient, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.parametrize("loss_type", [x for x in LOSS_TYPES if x != "cispo"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_gradient_matches_finite_differences_of_the_reference(loss_type, importance):
    # For importance "sequence" the row's ratio moves with every token of it: the differences see the sequence form,
    # and the token form must have the same gradient.
    inputs = make_inputs(1)
    options = {"loss_type": loss_type, "importance": importance, "kl": "k3", "beta": 0.1, "off_policy": True}
    options |= EXTRAS[1]
    _, gradient, _ = run(inputs, x64=True, **options)
    step = 1e-6
    for index in [(0, 0, 2), (0, 1, 0), (1, 1, 6), (1, 3, 5), (2, 4, 0), (0, 4, 3), (0, 2, 0)]:
        ends = []
        for sign in (1, -1):
            logp = inputs[0].copy()
            logp[index] += sign * step
            ends.append(reference((logp, *inputs[1:]), **options)[0])
        assert gradient[index] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-9)


def one_token(ratio, advantage, **options):
    """Loss, d loss / d logp and metrics of a single token with this ratio."""
    shape = (1, 1, 1)
    inputs = [
        np.full(shape, np.log(ratio)),
        np.zeros(shape),
        None,
        np.full((1, 1), advantage),
        np.ones(shape, bool),
        None,
    ]
    loss, gradient, metrics = run(
        inputs, off_policy=False, **{"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.3, **options}
    )
    return loss, gradient.item(), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "low", "high"),
    [
        (1.1, 2.0, -2.2, -2.2, 0, 0),  # inside: -r A, and d/dlogp is the same number
        (1.5, 2.0, -2.6, 0.0, 0, 1),  # already 1.3 times likelier, and good: the bound holds
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # good but grown unlikely: never bounded
        (1.1, -2.0, 2.2, 2.2, 0, 0),
        (1.5, -2.0, 3.0, 3.0, 0, 0),  # bad and grown likely: never bounded
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # bad and already below 0.8: the bound holds
        (1.5, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_clip_sides_by_hand(ratio, advantage, loss, slope, low, high):
    ours, gradient, metrics = one_token(ratio, advantage)
    assert ours == pytest.approx(loss, rel=1e-6) and gradient == pytest.approx(slope, rel=1e-6)
    assert (metrics["clip_low"], metrics["clip_high"], metrics["clip_region"]) == (low, high, low + high)
    assert metrics["ratio"] == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "bounded"),
    [
        (3.0, -2.0, 4.0, 0.0, 1),  # bad and grown likely: bounded by delta alone, -A delta
        (1.9, -2.0, 3.8, 3.8, 0),
        (0.5, -2.0, 1.6, 0.0, 0),  # the lower clip as ever
        (3.0, 2.0, -2.6, 0.0, 0),  # for A > 0 the clip at 1.3 comes first
    ],
)
def test_delta_bounds_negative_advantages(ratio, advantage, loss, slope, bounded):
    ours, gradient, metrics = one_token(ratio, advantage, delta=2.0)
    assert ours == pytest.approx(loss, rel=1e-6) and gradient == pytest.approx(slope, rel=1e-6)
    assert metrics["clip_delta"] == bounded
    assert metrics["clip_region"] == metrics["clip_low"] + metrics["clip_high"] + bounded == float(slope == 0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"), [(1.5, 2.0, 1.5), (7.0, 2.0, 5.0), (7.0, -2.0, 5.0), (0.1, 2.0, 0.1)]
)
def test_cispo_bounds_the_weight_by_epsilon_high_and_keeps_the_gradient(ratio, advantage, weight):
    loss, gradient, metrics = one_token(ratio, advantage, loss_type="cispo", epsilon_high=5.0)
    assert loss == pytest.approx(-weight * advantage * np.log(ratio), rel=1e-6)
    assert gradient == pytest.approx(-weight * advantage, rel=1e-6)
    assert (metrics["clip_low"], metrics["clip_high"]) == (0, float(ratio > 5))


def test_normalisation_by_hand():
    # One prompt, two samples of 1 and 3 tokens, ratio 1 everywhere, A = 1 and 2. Token losses: -1 | -2 -2 -2.
    mask = np.arange(3) < np.array([[[1], [3]]])
    zeros = np.zeros((1, 2, 3))
    inputs = [zeros, zeros, None, np.array([[1.0, 2.0]]), mask, None]
    expected = {"grpo": -1.5, "dapo": -7 / 4, "bnpo": -7 / 4, "dr_grpo": -7 / 22}
    for loss_type, value in expected.items():
        assert run(inputs, off_policy=False, beta=0.0, loss_type=loss_type)[0] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("skip", [False, True])
def test_a_group_without_tokens_counts_unless_it_is_skipped(loss_type, skip):
    mask = make_inputs()[4]
    masked = mask & (np.arange(P) != 1)[:, None, None]
    options = {"loss_type": loss_type, "max_completion_length": 11}
    weights = token_weights(masked, **options, skip_empty_groups=skip)
    # As if its prompt were not there; a sequence without tokens beside others of its group still counts.
    expected = np.asarray(token_weights(masked[[0, 2]], **options))
    if not skip and loss_type in ("grpo", "dr_grpo"):
        expected = expected * 2 / 3
    np.testing.assert_allclose(weights[np.array([0, 2])], expected, rtol=1e-6)
    assert not np.asarray(weights[1]).any()


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_ratio_beyond_float32_has_a_finite_gradient(importance, sign):
    mask = np.ones((1, 1, 2), bool)
    inputs = [np.zeros((1, 1, 2)), np.full((1, 1, 2), -200.0), None, np.array([[float(sign)]]), mask, None]
    loss, gradient, _ = run(inputs, off_policy=False, beta=0.0, importance=importance)
    assert np.isfinite(gradient).all() and np.isfinite(loss)
    if sign > 0:
        assert loss == pytest.approx(-1.28, rel=1e-6) and not gradient.any()


def test_reductions_by_hand():
    # Two prompts of two samples, token losses 1 in the sequences of 1, 3, 2 and 2 tokens; the second's first is cut.
    mask = np.arange(3) < np.array([[[1], [3]], [[0], [2]]])
    zeros = np.zeros((2, 2, 3))
    inputs = [zeros, zeros, None, -np.array([[4.0, 1.0], [1.0, 3.0]]), mask, None]
    expected = {"grpo": (4 + 1 + 0 + 3) / 4, "dapo": (4 + 3 + 6) / 6, "bnpo": 13 / 6, "dr_grpo": 13 / (4 * 11)}
    for loss_type, value in expected.items():
        assert run(inputs, off_policy=False, beta=0.0, loss_type=loss_type)[0] == pytest.approx(value, rel=1e-6)
    # bnpo in two micro-batches is the mean of (4 + 3) / 4 and 6 / 2.
    pieces = [[x if x is None else x[p : p + 1] for x in inputs] for p in range(2)]
    each = [run(piece, off_policy=False, beta=0.0, loss_type="bnpo")[0] for piece in pieces]
    assert sum(each) / 2 == pytest.approx((7 / 4 + 3) / 2, rel=1e-6)


def test_off_policy_row_has_ratio_pi_and_no_clip():
    # A row that was not sampled, pi = 0.1, A = 2.475: loss -0.2475, gradient -pi A; its old log-probability is junk.
    shape = (1, 1, 1)
    inputs = [np.full(shape, np.log(0.1)), np.full(shape, np.nan), None, np.full((1, 1), 2.475), np.ones(shape, bool)]
    loss, gradient, metrics = run([*inputs, np.ones((1, 1), bool)], off_policy=True, beta=0.0)
    assert loss == pytest.approx(-0.2475, rel=1e-6) and gradient.item() == pytest.approx(-0.2475, rel=1e-6)
    # With A < 0 a clip at 0.8 would have stopped the gradient.
    inputs[3] = -inputs[3]
    _, gradient, metrics = run([*inputs, np.ones((1, 1), bool)], off_policy=True, beta=0.0)
    assert gradient.item() == pytest.approx(0.2475, rel=1e-6) and metrics["clip_region"] == 0


def test_a_shaped_row_by_hand():
    # pi = 0.1, gamma = 0.1: f = 0.5 and f' pi = 0.1 * 0.1 / 0.04 = 0.25 in place of 0.1 and 0.1; delta does not apply.
    shape = (1, 1, 1)
    inputs = [np.full(shape, np.log(0.1)), np.full(shape, np.nan), None, np.full((1, 1), 2.0), np.ones(shape, bool)]
    options = {"off_policy": True, "beta": 0.0, "off_policy_shaping": 0.1, "delta": 1.5}
    loss, gradient, _ = run([*inputs, np.ones((1, 1), bool)], **options)
    assert loss == pytest.approx(-1.0, rel=1e-6) and gradient.item() == pytest.approx(-0.5, rel=1e-6)
    sampled = [*inputs[:1], np.full(shape, np.log(0.1)), *inputs[2:], np.zeros((1, 1), bool)]
    assert run(sampled, **options)[0] == pytest.approx(-2.0, rel=1e-6)


def test_metrics_of_the_ratio_are_about_sampled_tokens():
    # A sampled token of ratio 1.5 beside three tokens of a reference with pi = 0.1: not (1.5 + 0.3) / 4.
    logp = np.log(np.array([[[1.5, 1.0, 1.0], [0.1, 0.1, 0.1]]]))
    mask = np.arange(3) < np.array([[[1], [3]]])
    off = np.array([[False, True]])
    inputs = [logp, np.zeros((1, 2, 3)), logp - np.log(2.0), np.ones((1, 2)), mask, off]
    _, _, metrics = run(inputs, off_policy=True)
    expected = {"ratio": 1.5, "clip_low": 0.0, "clip_high": 1.0, "clip_region": 1.0, "kl": np.log(2.0) - 0.5}
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_mixed_policy_group_by_hand():
    # G = 8, the reference alone is right: A = 7/8 / std = 2.475 for it and -0.354 for the others.
    rewards = np.array([[0.0] * 7 + [1.0]])
    advantage = group_advantages(rewards, "group")
    np.testing.assert_allclose(advantage, [[-0.354] * 7 + [2.475]], atol=2e-3)
    np.testing.assert_array_equal(group_advantages(np.ones((1, 8)), "group"), 0)
    pi, shape = np.array([0.9, 0.4, 0.05]), (1, 8, 3)
    logp = np.broadcast_to(np.log(pi), shape)
    off = np.arange(8)[None] == 7
    inputs = [logp, logp, None, advantage, np.ones(shape, bool), off]
    loss, gradient, metrics = run(inputs, off_policy=True, x64=True, beta=0.0)
    on, reference_row = advantage[0, 0], advantage[0, 7]
    assert loss == pytest.approx(-(21 * on + reference_row * pi.sum()) / 24, rel=1e-9)
    np.testing.assert_allclose(gradient[0, 7], -pi * reference_row / 24, rtol=1e-9)
    np.testing.assert_allclose(gradient[0, :7], -on / 24, rtol=1e-9)
    assert metrics["ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("junk", [np.nan, -np.inf, 1e30])
def test_masked_positions_are_never_read(loss_type, importance, junk):
    logp, old_logp, ref_logp, advantage, mask, is_off = make_inputs(2)
    options = {"off_policy": True, "loss_type": loss_type, "importance": importance, "beta": 0.1}
    clean = run((logp, old_logp, ref_logp, advantage, mask, is_off), **options)
    spoilt = [np.where(mask, x, junk) for x in (logp, old_logp, ref_logp)]
    # The advantage of an empty row is as meaningless as its tokens.
    spoilt_advantage = np.where(mask.any(-1), advantage, junk)
    loss, gradient, metrics = run((*spoilt, spoilt_advantage, mask, is_off), **options)
    assert loss == clean[0] and metrics == clean[2]
    np.testing.assert_array_equal(gradient, clean[1])
    assert np.all(gradient[~mask] == 0) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("junk", [np.nan, -np.inf, 1e30])
def test_masked_positions_enter_no_arithmetic(junk):
    # So a run under jax.debug_nans or jax.debug_infs stops at a real fault, not at padding.
    *floats, mask, is_off = make_inputs(2)
    logp, old_logp, ref_logp = (jnp.asarray(np.where(mask, x, junk), jnp.float32) for x in floats[:3])
    advantage = jnp.asarray(floats[3], jnp.float32)
    with jax.debug_nans(True), jax.debug_infs(True):
        token_loss(logp, old_logp, ref_logp, advantage, jnp.asarray(mask), jnp.asarray(is_off), importance="sequence")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_empty_batch_costs_nothing(loss_type):
    logp, old_logp, ref_logp, advantage, mask, is_off = make_inputs()
    loss, gradient, metrics = run(
        (logp, old_logp, ref_logp, advantage, mask & False, is_off), off_policy=True, loss_type=loss_type
    )
    assert loss == 0 and np.all(gradient == 0) and set(metrics.values()) == {0.0}


def test_the_end_of_sequence_token_is_trained():
    # It is the last true position of the mask: lengthening or shortening an answer is learnt there.
    inputs = make_inputs()
    _, gradient, _ = run((inputs[0], inputs[0], *inputs[2:]), off_policy=False, beta=0.0)
    for p, g in itertools.product(range(P), range(G)):
        if LENGTHS[p, g]:
            assert gradient[p, g, LENGTHS[p, g] - 1] != 0


@functools.partial(jax.jit, static_argnames=["loss_type"])
def piece_of_loss(logp, weights, others, loss_type):
    def f(logp):
        options = {"importance": "sequence", "epsilon_low": 0.2, "epsilon_high": 0.28}
        return jnp.sum(weights * token_loss(logp, *others, loss_type=loss_type, **options)[0])

    return jax.value_and_grad(f)(logp)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("axis", "sizes"), [(0, [1, 2]), (0, [1, 1, 1]), (1, [2, 3])])
def test_loss_and_gradient_do_not_depend_on_micro_batches(loss_type, axis, sizes):
    # Weights of the whole batch, sliced: the pieces add up to the whole, however ragged the pieces are.
    inputs = make_inputs(3)
    whole, whole_gradient, _ = run(
        inputs, off_policy=True, loss_type=loss_type, importance="sequence", kl="k3", beta=0.02
    )
    mask = jnp.asarray(inputs[4])
    weights = token_weights(mask, loss_type=loss_type, max_completion_length=OPTIONS["max_completion_length"])
    arrays = [jnp.asarray(x, bool if x.dtype == bool else jnp.float32) for x in inputs]
    losses, gradients, start = [], [], 0
    for size in sizes:
        piece = (slice(None),) * axis + (slice(start, start + size),)
        logp, *others = (x[piece] for x in arrays)
        loss, gradient = piece_of_loss(logp, weights[piece], others, loss_type)
        losses.append(float(loss))
        gradients.append(gradient)
        start += size
    assert sum(losses) == pytest.approx(whole, rel=1e-5)
    np.testing.assert_allclose(np.concatenate(gradients, axis), whole_gradient, rtol=1e-5, atol=1e-8)


def test_bnpo_on_micro_batches_is_the_mean_of_their_token_means():
    mask = jnp.asarray(np.arange(4) < np.array([[[1]], [[4]]]))
    pieces = [token_weights(mask[p : p + 1], loss_type="bnpo") for p in range(2)]
    assert [x[0, 0].tolist() for x in pieces] == [[1.0, 0.0, 0.0, 0.0], [0.25] * 4]


def test_metrics_are_token_means():
    # Ratios 1, 1.5 and 3, A = 1: two of three tokens are bounded from above; pi_ref = pi / 2.
    logp = np.log(np.array([[[1.0, 1.5, 3.0, 9.0]]]))
    mask = np.array([[[True, True, True, False]]])
    inputs = [logp, np.zeros_like(logp), logp - np.log(2.0), np.ones((1, 1)), mask, None]
    _, _, metrics = run(inputs, off_policy=False)
    expected = {"ratio": 5.5 / 3, "clip_low": 0.0, "clip_high": 2 / 3, "clip_region": 2 / 3, "kl": np.log(2.0) - 0.5}
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_reference_is_optional_only_without_beta():
    logp, old_logp, ref_logp, advantage, mask, _ = make_inputs()
    without, gradient, metrics = run((logp, old_logp, None, advantage, mask, None), off_policy=False, beta=0.0)
    with_reference, same_gradient, its_metrics = run(
        (logp, old_logp, ref_logp, advantage, mask, None), off_policy=False, beta=0.0
    )
    assert without == with_reference and "kl" not in metrics and its_metrics["kl"] > 0
    np.testing.assert_array_equal(gradient, same_gradient)
    with pytest.raises(UserError, match="beta is 0.02 but there are no reference"):
        run((logp, old_logp, None, advantage, mask, None), off_policy=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss type 'ppo' is unknown: use one of grpo, dapo, bnpo, dr_grpo, cispo"),
        ({"importance": "group"}, "importance 'group' is unknown: use one of token, sequence"),
        ({"kl": "k9"}, "KL estimator 'k9' is unknown: use one of k1, k2, k3"),
        ({"delta": 1.28}, r"delta is 1.28; .* must be above 1 \+ epsilon_high = 1.28"),
        ({"delta": 2.0, "loss_type": "cispo"}, "cispo bounds the ratio by epsilon_high alone: set delta to None"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "give a positive max_completion_length"),
    ],
)
def test_wrong_options_list_the_right_ones(options, message):
    with pytest.raises(UserError, match=message):
        run(make_inputs(), off_policy=False, **options)


def test_old_and_reference_log_probabilities_have_no_gradient():
    logp, old_logp, ref_logp, advantage, mask, _ = (jnp.asarray(x) for x in make_inputs())
    gradients = jax.grad(lambda old, ref: policy_loss(logp, old, ref, advantage, mask)[0], (0, 1))(old_logp, ref_logp)
    assert all(np.all(np.asarray(x) == 0) for x in gradients)


def test_supervised_loss_by_hand():
    # Tokens of probability 1/2 and 1/4, then padding: (ln 2 + ln 4) / 2.
    logp = jnp.log(jnp.array([[[0.5, 0.25, 0.0]]]))
    mask = jnp.array([[[True, True, False]]])
    weights = token_weights(mask, loss_type="dapo")
    loss, gradient = jax.value_and_grad(lambda x: jnp.sum(weights * sft_token_loss(x, mask)))(logp)
    assert float(loss) == pytest.approx(1.5 * np.log(2.0), rel=1e-6)
    assert gradient.tolist() == [[[-0.5, -0.5, 0.0]]]
