"""The windowed Q-Former against transformers."""

import jax
import numpy as np
import pytest
import torch

from tests.parity.pairs import torch_of

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("pair", "frames"), [("lora", 1), ("lora", 15), ("lora", 31), ("plus", 16)])
def test_projector(request, close, pair, frames):
    """The last window is filled up with zeros, and the queries do look at them."""
    reference, model = request.getfixturevalue(pair)
    width = model.config.encoder.embedding_dim
    encoded = np.random.default_rng(frames).normal(size=(2, frames, width)).astype(np.float32)
    with torch.no_grad():
        expected = reference.model.projector(torch_of(encoded))
    assert expected.shape == (2, model.config.projector.num_slots(frames), model.config.decoder.hidden_size)
    close(f"projector, {pair}", jax.jit(model.projector)(encoded), expected)
