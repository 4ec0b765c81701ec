"""Generation against transformers, and against plain forward passes over whole sequences."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from model_port.generate import generate
from model_port.params import split_model
from model_port.weights.convert import build_model
from tests.invariance.tiny import at, clip, full_forward, make_batch
from tests.parity.pairs import torch_of

pytestmark = pytest.mark.parity

T = 16
PROMPTS = [
    [5, 6, clip(13), 17, 3],
    [5, clip(15, seed=3), 9],
    [clip(37), 17, 3, 40, 41, 42, 43],
    [7, clip(21, seed=1), 8, clip(21, seed=2), 9],
]


def hf_greedy(model, batch, p, eos):
    """The reference's greedy tokens for one prompt by itself, up to and including the end token."""
    ids = torch_of(batch.tokens[p][batch.mask[p]])[None]
    clips = torch.stack([torch_of(item) for item in PROMPTS[p] if not isinstance(item, int)])
    options = {"max_new_tokens": T, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos}
    out = model.generate(
        ids,
        input_features=clips,
        attention_mask=torch.ones_like(ids),
        suppress_tokens=[model.config.audio_token_id],
        **options,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def batch(untied):
    return make_batch(untied[1].config, PROMPTS, frames=50, tokens=40)


@pytest.fixture(scope="module")
def ending(untied, batch):
    """(model, eos, the reference's tokens) for an end token that stops some of the prompts on their way."""
    reference, model = untied
    free = [hf_greedy(reference, batch, p, eos=model.config.audio_token_id) for p in range(len(PROMPTS))]
    counts = {token: sum(token in row[2:-2] and token not in row[:2] for row in free) for row in free for token in row}
    eos = max((token for token in counts if not all(token in row for row in free)), key=counts.get)
    config = dataclasses.replace(model.config, eos_token_ids=(eos,))
    rows = [hf_greedy(reference, batch, p, eos=eos) for p in range(len(PROMPTS))]
    return build_model(config, dict(split_model(model)[1])), eos, rows


@pytest.fixture(scope="module")
def greedy(ending, batch):
    return generate(ending[0], batch, max_new_tokens=T, temperature=0)


def test_greedy_equals_transformers_token_for_token(ending, greedy):
    _, eos, expected = ending
    assert {len(row) == T for row in expected} == {True, False}, "some prompts should end early, and some not"
    tokens, mask = np.asarray(greedy.tokens)[:, 0], np.asarray(greedy.mask)[:, 0]
    ours = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    assert ours == expected
    assert all(row[-1] == eos and eos not in row[:-1] for row in ours if len(row) < T)


def test_greedy_with_cache_equals_greedy_without(ending, greedy, batch):
    """Every token is the most probable one of a pass over the whole sequence before it."""
    mask = np.asarray(greedy.mask)
    logp = full_forward(ending[0], batch, greedy.tokens)
    np.testing.assert_array_equal(logp.argmax(-1)[mask], np.asarray(greedy.tokens)[mask])
    np.testing.assert_allclose(np.asarray(greedy.logp)[mask], logp.max(-1)[mask], atol=1e-4)


def test_sampled_log_probs_equal_a_full_forward_pass(ending, batch, close):
    model, _, _ = ending
    out = generate(model, batch, key=jax.random.key(3), num_samples=3, max_new_tokens=T, temperature=0.7)
    mask = np.asarray(out.mask)
    logp = at(full_forward(model, batch, out.tokens, temperature=0.7), out.tokens)
    close("log-probs of samples, against full forward", np.asarray(out.logp)[mask], logp[mask].astype(np.float32), 1e-4)
    for group in np.asarray(out.tokens):
        assert len({tuple(row) for row in group}) == 3
