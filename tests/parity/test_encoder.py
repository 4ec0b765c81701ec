"""The conformer encoder against transformers, each part by itself and the whole; in part B of each, padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.invariance.tiny import clip, make_batch
from tests.parity.pairs import torch_of

pytestmark = pytest.mark.parity

CONTEXT = 20
# Shorter than the context, the context, one frame more, and a last block that is nearly full.
LENGTHS = (13, CONTEXT, CONTEXT + 1, 2 * CONTEXT - 3)
PADDED = 2 * CONTEXT + 5


def part(model, index):
    """Return block `index` of the stacked encoder."""
    graph, state = nnx.split(model.encoder.layers)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))


def streams():
    """Hidden states of four clips [A, E], and all of them padded with garbage to [4, PADDED, E] with their mask."""
    rng = np.random.default_rng(0)
    # So small that the epsilon of a LayerNorm counts.
    alone = [rng.normal(scale=0.02, size=(length, 24)).astype(np.float32) for length in LENGTHS]
    padded = rng.normal(scale=30.0, size=(4, PADDED, 24)).astype(np.float32)
    for row, stream in zip(padded, alone, strict=True):
        row[: len(stream)] = stream
    return alone, padded, np.arange(PADDED)[None] < np.array(LENGTHS)[:, None]


@pytest.mark.parametrize("name", ["ff1", "ff2"])
def test_feed_forward(lora, close, name):
    reference, model = lora
    alone, _, _ = streams()
    with torch.no_grad():
        expected = getattr(reference.model.encoder.layers[1], name)(torch_of(alone[0])[None])
    close("encoder feed-forward", jax.jit(getattr(part(model, 1), name))(alone[0][None]), expected)


@pytest.mark.parametrize("name", ["attn", "conv", "block"])
def test_attention_convolution_and_block(lora, close, name):
    reference, model = lora
    alone, padded, valid = streams()
    theirs, ours = reference.model.encoder.layers[2], part(model, 2)
    if name != "block":
        theirs, ours = getattr(theirs, name), getattr(ours, name)
    extra = () if name == "conv" else (reference.model.encoder.attention_dists,)
    run = jax.jit(ours)
    together = run(padded, valid)
    for p, stream in enumerate(alone):
        with torch.no_grad():
            expected = theirs(torch_of(stream)[None], *extra)
        close(f"encoder {name}", run(stream[None], np.ones((1, len(stream)), bool)), expected)
        close(f"encoder {name}, padded", together[p, : len(stream)], expected[0])


@pytest.mark.parametrize("pair", ["lora", "plus"])
def test_encoder(request, close, pair):
    """The plus encoder returns the input projection, the middle layer and the last but one in front of the last."""
    reference, model = request.getfixturevalue(pair)
    clips = [clip(length, seed=length) for length in LENGTHS]
    batch = make_batch(model.config, [[c] for c in clips], frames=PADDED, garbage=30.0)
    run = jax.jit(model.encoder)
    together = run(batch.features[:, 0], batch.lengths[:, 0])
    for p, features in enumerate(clips):
        with torch.no_grad():
            expected = reference.model.encoder(torch_of(features)[None]).last_hidden_state[0]
        assert expected.shape[1] == model.config.encoder.embedding_dim
        close(f"encoder, {pair}, padded", together[p, : len(features)], expected)
        if pair == "lora" and p in (0, 3):
            close(f"encoder, {pair}", run(features[None], jnp.array([len(features)]))[0], expected)
    assert not np.asarray(together)[~(np.arange(PADDED)[None] < batch.lengths)].any()


def test_the_middle_layer_is_exported_with_the_ctc_feedback(plus):
    """transformers adds the feedback in place to the tensor that it has already exported; the weights know it so."""
    _, model = plus
    features = jnp.asarray(clip(CONTEXT))[None]
    _, taps = model.encoder.hidden_states(features, jnp.array([CONTEXT]))
    _, plain = model.encoder.hidden_states(features, jnp.array([CONTEXT]), taps=(2,), before_feedback=True)
    feedback = model.encoder.out_mid(jax.nn.softmax(model.encoder.out(plain[2]), axis=-1))
    assert np.abs(feedback).max() > 0.1
    np.testing.assert_allclose(taps[2], plain[2] + feedback, atol=1e-5)
