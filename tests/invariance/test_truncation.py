"""A truncated rollout: its log-probs are those of the truncated distribution in rollout, reference and update alike."""

import jax
import numpy as np
import pytest

from jgrpo.config import GRPOOptions
from jgrpo.programs.steps import grpo_objective, truncation
from tests.invariance.run import TEMPERATURE, Run, make_targets
from tests.invariance.tiny import G, T

OPTIONS = GRPOOptions(num_samples=G, temperature=TEMPERATURE, beta=0.1, top_p=0.8, top_k=20, min_p=0.02)


@pytest.fixture(scope="module")
def ours():
    return Run(objective=grpo_objective(OPTIONS, T), trainable=("lora",))


def test_rollout_reference_and_update_agree(ours, run):
    out = jax.device_get(ours.rollout(**truncation(OPTIONS)))
    scored = ours.score(out.tokens)
    np.testing.assert_allclose(scored[out.mask], out.logp[out.mask], atol=1e-5)
    _, metrics = ours.gradient(make_targets(out, old_logp=out.logp, ref_logp=scored))
    assert metrics["logp_drift_max"] < 1e-5 and metrics["kl"] < 1e-6
    # Over all tokens they would be smaller: the truncation removes much.
    assert (run.score(out.tokens) - scored)[out.mask].mean() < -0.1


def test_tokens_it_would_not_sample_have_finite_log_probs_and_gradients(ours, run, out):
    """As a reference answer's may be, or an older policy's: of 128 tokens at most 20 are in the support."""
    tokens = np.random.default_rng(0).integers(0, 127, out.tokens.shape).astype(np.int32)
    scored, full = ours.score(tokens), run.score(tokens)
    assert np.isfinite(scored).all() and (scored >= full - 1e-5).all()
    _, metrics = ours.gradient(make_targets(out, tokens=tokens, old_logp=scored, ref_logp=scored))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == 0 and metrics["logp_drift_max"] < 1e-5
