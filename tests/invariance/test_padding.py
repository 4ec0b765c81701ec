"""No row depends on what it is batched with or padded to: not its embeddings, logits, log-probs or samples.

Also fault 3 (BatchNorm by batch statistics and dropout make another model) and fault 7 (audio paired with other rows).
"""

import jax
import numpy as np
import pytest

from jgrpo.rollout.scoring import step_keys
from tests.invariance.tiny import CONFIG, PROMPTS, G, P, clip, make_batch, make_model

TOLERANCE = 1e-5
KEYS = step_keys(0, 0, num_prompts=P, num_samples=G)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def seen(run, model, out):
    """What every row gets in the batch of eight."""
    return results(run, model, run.batch, out.tokens)


def results(run, model, batch, tokens, keys=KEYS):
    """Per row: its real audio embeddings, its real logits, log-probs of the given tokens, and its own samples."""
    embeddings, mask = (np.asarray(x) for x in model.encode_audio(batch))
    logits = np.asarray(model(batch))
    out = jax.device_get(run.rollout(batch, keys=keys))
    return {
        "embeddings": [row[keep] for row, keep in zip(embeddings, mask, strict=True)],
        "logits": [row[keep] for row, keep in zip(logits, batch.mask, strict=True)],
        "logp": list(run.score(tokens, batch)),
        "tokens": list(out.tokens),
        "sampled logp": list(out.logp),
    }


def assert_rows_equal(ours, expected, rows):
    """Row k of ours is row rows[k] of expected."""
    for name, values in ours.items():
        for k, row in enumerate(rows):
            assert values[k].shape == expected[name][row].shape, name
            np.testing.assert_allclose(values[k], expected[name][row], atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)


def test_a_larger_bucket_full_of_garbage(run, model, out, seen):
    """A and L grow, past a multiple of context and window; an empty clip appears; padded frames hold noise."""
    batch = make_batch(CONFIG, PROMPTS, frames=64, tokens=40, clips=3, garbage=100.0)
    assert batch.features.shape == (P, 3, 64, 160) and run.batch.features.shape == (P, 2, 40, 160)
    assert_rows_equal(results(run, model, batch, out.tokens), seen, range(P))


def test_alone_and_unpadded(run, model, out, seen):
    row = 2
    batch = make_batch(CONFIG, PROMPTS[row : row + 1])
    assert batch.mask.all() and batch.lengths.max() == batch.features.shape[2] < run.batch.features.shape[2]
    assert_rows_equal(results(run, model, batch, out.tokens[row : row + 1], KEYS[row : row + 1]), seen, [row])


def test_other_batch_mates(run, model, out, seen):
    """Fault 3: half of the batch becomes loud noise. Statistics of the batch would carry it over to the other half."""
    loud = [[9, 20.0 * clip(40, seed), 9, 9] for seed in range(4)]
    batch = make_batch(CONFIG, PROMPTS[:4] + loud, frames=40, tokens=run.batch.tokens.shape[1], clips=2)
    assert_rows_equal(results(run, model, batch, out.tokens), seen, range(4))


def test_swapping_prompts_swaps_their_groups(run, model, out, seen):
    """Fault 7: every row follows its own audio, with its own key."""
    order = np.array([1, 0, 3, 2, 5, 4, 7, 6])
    batch = make_batch(CONFIG, [PROMPTS[p] for p in order])
    assert_rows_equal(results(run, model, batch, out.tokens[order], KEYS[order]), seen, order)


def test_swapping_two_clips_swaps_what_is_heard(run, out):
    """Fault 7: two prompts of the same words; only the clips change places."""
    first, second = clip(22, 20), clip(24, 21)
    rows = ([[5, first, 6], [5, second, 6]], [[5, second, 6], [5, first, 6]])
    sizes = {"frames": 40, "clips": 2, "tokens": run.batch.tokens.shape[1]}
    one, other = (make_batch(CONFIG, [*two, *PROMPTS[2:]], **sizes) for two in rows)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    greedy, greedy_swapped = (np.asarray(run.rollout(batch, temperature=0.0).tokens) for batch in (one, other))
    assert (greedy[0] != greedy[1]).any()
    np.testing.assert_array_equal(greedy_swapped[:2], greedy[1::-1])
    tokens = np.repeat(out.tokens[:1], P, axis=0)
    logp, logp_swapped = run.score(tokens, one), run.score(tokens, other)
    assert np.abs(logp[0] - logp[1]).max() > 0.1
    np.testing.assert_allclose(logp_swapped[:2], logp[1::-1], atol=TOLERANCE)
    np.testing.assert_allclose(logp_swapped[2:], logp[2:], atol=TOLERANCE)


def test_stored_statistics_and_no_dropout(run, targets, gradient):
    """Fault 3: the encoder repeats itself to the bit, hears with the stored statistics, and no update touches them."""
    np.testing.assert_array_equal(run.encode(), run.encode())
    again, metrics = run.gradient(targets)
    assert metrics == gradient[1]
    jax.tree.map(np.testing.assert_array_equal, again, gradient[0])
    assert run.definition.stats == {f"encoder.layers.conv.batch_norm.{name}" for name in ("mean", "var")}
    assert not run.definition.stats & run.trained.keys()
    for name in run.definition.stats:
        changed = {**run.frozen, name: run.frozen[name] + 0.5}
        other = run.programs.encode(run.trained, changed, jax.tree.map(jax.numpy.asarray, run.batch))
        assert np.abs(other - run.encode()).max() > 0.01, name
