"""A vocabulary that the mesh does not divide is padded in memory, and nobody notices: not a sample, loss or file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model_port.partition import MeshConfig, make_mesh, param_shardings, vocab_multiple
from model_port.published import PUBLISHED
from model_port.weights.convert import load_model, open_model, save_model
from model_port.weights.tree import abstract_model
from tests.invariance.run import TRAINABLE, Run, make_targets
from tests.invariance.test_mesh import TOLERANCE, assert_same_update
from tests.invariance.tiny import CONFIG, PROMPTS, make_batch, make_model

ODD = dataclasses.replace(
    CONFIG, decoder=dataclasses.replace(CONFIG.decoder, vocab_size=125), audio_token_id=124, tie_word_embeddings=False
)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("fsdp", [1, 3, 16])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_every_published_model_on_every_mesh(name, fsdp, tensor):
    mesh = jax.sharding.AbstractMesh((1, fsdp, tensor), ("data", "fsdp", "tensor"))
    config = PUBLISHED[name].padded(vocab_multiple(mesh))
    assert 0 <= config.decoder.vocab_padding < 8
    state = nnx.state(abstract_model(config, jnp.bfloat16))
    split = param_shardings(state, mesh)
    for path, variable in nnx.to_flat_state(state):
        sharding = split[".".join(map(str, path))]
        sharding.shard_shape(variable.shape)  # raises where an axis does not divide
        if "embed_tokens" in path:
            assert sharding.spec[0] == "tensor" and (sharding.spec[1] == "fsdp") == (fsdp != 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of 125 tokens, with a head of its own."""
    path = tmp_path_factory.mktemp("odd") / "model"
    save_model(make_model(ODD), path)
    return path


def test_numbers_and_files_are_those_without_padding(saved, tmp_path):
    trainable = (*TRAINABLE, "lm_head", "decoder.embed_tokens")
    alone = Run(ODD, model=make_model(ODD), trainable=trainable)
    mesh = make_mesh(MeshConfig(1, 2, 4))
    model = load_model(saved, mesh=mesh)
    assert model.config.decoder.vocab_padding == 3 and model.lm_head.kernel.shape[1] == 128
    ours = Run(ODD, mesh=(1, 2, 4), model=model, trainable=trainable)
    samples, expected = jax.device_get(ours.rollout()), jax.device_get(alone.rollout())
    np.testing.assert_array_equal(samples.tokens, expected.tokens)
    np.testing.assert_allclose(samples.logp, expected.logp, atol=TOLERANCE)
    targets = make_targets(expected)
    gradient, metrics = ours.gradient(targets)
    for name, axis in (("lm_head.kernel", 1), ("decoder.embed_tokens.embedding", 0)):
        real, padding = np.split(gradient[name], [125], axis=axis)
        assert padding.shape[axis] == 3 and not padding.any()
        gradient[name] = real
    assert_same_update((gradient, metrics), alone.gradient(targets))
    batch = make_batch(ODD, PROMPTS)
    logits = model(batch)
    assert logits.shape[-1] == 125
    np.testing.assert_allclose(logits, load_model(saved)(batch), atol=TOLERANCE)
    save_model(model, tmp_path / "again")
    (config, before), (_, after) = open_model(saved), open_model(tmp_path / "again")
    assert config == ODD
    for name, array in before.items():
        np.testing.assert_array_equal(np.asarray(after[name]), np.asarray(array), err_msg=name)
