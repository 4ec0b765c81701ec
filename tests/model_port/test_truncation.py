"""truncate_logits against the warpers of transformers, alone and one after the other as its generate applies them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from model_port.errors import UserError
from model_port.sampling import row_keys, sample, truncate_logits

ROWS, V = 40, 97


def warped(logits, *, top_k=0, top_p=1.0, min_p=0.0):
    scores = torch.tensor(logits)
    for warper in (
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ):
        scores = warper(None, scores) if warper else scores
    return scores.numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_p": 0.9},
        {"top_k": 20, "top_p": 0.8},
        {"top_p": 0.95, "min_p": 0.1},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_what_transformers_keeps(options):
    logits = np.random.default_rng(0).normal(scale=2.0, size=(ROWS, V)).astype(np.float32)
    logits[0, [3, 5, 8, 13, 21, 34, 55, 89]] = 6.0  # more equal logits at the top than some options keep
    if "top_p" in options:
        logits = logits[1:]  # which of equal logits a nucleus keeps, transformers leaves to its sort
    np.testing.assert_array_equal(truncate_logits(logits, **options), warped(logits, **options))


def test_a_token_can_be_kept_whatever_its_rank():
    logits = np.random.default_rng(0).normal(scale=2.0, size=(ROWS, V)).astype(np.float32)
    keep = np.arange(ROWS)
    options = {"top_k": 5, "top_p": 0.9, "min_p": 0.01}
    out, plain = (np.asarray(truncate_logits(logits, **options, keep=k)) for k in (keep, None))
    rows = np.arange(ROWS)
    np.testing.assert_array_equal(out[rows, keep], logits[rows, keep])
    assert np.isneginf(plain[rows, keep]).any()
    others = keep[:, None] != np.arange(V)
    np.testing.assert_array_equal(out[others], plain[others])


def test_draws_stay_inside_and_know_their_probability():
    logits = np.random.default_rng(3).normal(scale=2.0, size=V).astype(np.float32)
    kept = warped(logits[None] / 0.8, top_k=12, top_p=0.9, min_p=0.05)[0].astype(np.float64)
    with np.errstate(divide="ignore"):
        expected = kept - np.log(np.exp(kept).sum())
    keys = row_keys(jax.random.key(0), num_prompts=20, num_samples=50)
    rows = jnp.broadcast_to(logits, (20, 50, V))
    tokens, logp = sample(keys, rows, temperature=0.8, top_k=12, top_p=0.9, min_p=0.05)
    np.testing.assert_allclose(logp, expected[tokens], rtol=1e-5, atol=1e-6)
    assert set(np.unique(tokens).tolist()) == set(np.flatnonzero(np.isfinite(kept)).tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": -1}, "top_k must be at least 0, got -1"), ({"min_p": 1.5}, r"min_p must lie in \[0, 1\], got 1.5")],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        truncate_logits(jnp.zeros(4), **options)
