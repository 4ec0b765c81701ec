"""A group that shares its prompt's keys and values costs L + G T tokens, and learns what G separate sequences would."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.invariance.run import BETA, TEMPERATURE, TRAINABLE, gradient_error
from tests.invariance.tiny import CONFIG, G, P, T, extend

EPSILON = 0.2


def separate_sequences(definition, frozen, batch, tokens, targets):
    """The DAPO loss as a function of the trained parameters: every sequence runs in full, nothing is shared."""
    assert CONFIG.audio_token_id == CONFIG.decoder.vocab_size - 1, "deleting the last id moves no other"
    rows = jax.tree.map(jnp.asarray, extend(batch, tokens))
    first = np.repeat(batch.mask.sum(-1), G)[:, None] - 1 + np.arange(T)[None]

    def loss(trained):
        model = definition.bind(frozen, trained)
        encoded = model.encode(rows.features, rows.lengths)
        hidden, _ = model.decoder.prefill(model.embed_prompts(rows, encoded), rows.mask)
        logits = model.logits(jnp.take_along_axis(hidden, first[:, :, None], axis=1)) / TEMPERATURE
        logits = jnp.delete(logits, CONFIG.audio_token_id, axis=-1)
        logp = jax.nn.log_softmax(logits, axis=-1).reshape(P, G, T, -1)
        logp = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
        ratio = jnp.exp(logp - targets.old_logp)
        advantage = targets.advantage[:, :, None]
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - EPSILON, 1 + EPSILON) * advantage)
        log_ratio = targets.ref_logp - logp
        kl = jnp.exp(log_ratio) - log_ratio - 1
        return jnp.sum(jnp.where(targets.mask, BETA * kl - gain, 0.0)) / targets.mask.sum()

    return loss


def test_loss_and_gradient_equal_those_of_separate_sequences(run, out, targets, gradient):
    loss = jax.jit(jax.value_and_grad(separate_sequences(run.definition, run.frozen, run.batch, out.tokens, targets)))
    expected, separate = loss(run.trained)
    ours, metrics = gradient
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert all(any(part in name for name in ours) for part in TRAINABLE)
    error, name = gradient_error(ours, separate)
    assert error < 1e-5, f"{name}: {error:.1e} of its largest component"
