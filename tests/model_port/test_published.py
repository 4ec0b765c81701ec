"""The released models have exactly the parameters that were released; shapes only, so it costs no memory."""

import math

import jax.numpy as jnp
import pytest
from flax import nnx

from model_port.published import PUBLISHED
from model_port.weights.tree import abstract_model, variables

# Parameters without BatchNorm statistics and adapter, and of the adapter; from the Hugging Face API and from
# transformers on the meta device.
COUNTS = {
    # The first 3.3 model of this size has four tokens more.
    "granite-speech-3.2-8b": (8_483_473_706 - 4 * 4096, 34_078_720),
    "granite-speech-3.3-2b": (3_009_219_840, 17_039_360),
    "granite-speech-3.3-8b": (8_648_645_888, 34_078_720),
    "granite-speech-3.3-2b-first": (2_844_047_658, 17_039_360),
    "granite-speech-3.3-8b-first": (8_483_473_706, 34_078_720),
    "granite-4.0-1b-speech": (2_313_141_596, 0),
    "granite-speech-4.1-2b": (2_313_141_596, 0),
    "granite-speech-4.1-2b-plus": (2_111_812_956, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    found = variables(abstract_model(PUBLISHED[name], jnp.bfloat16))
    sizes = {path: math.prod(variable.shape) for path, variable in found.items()}
    statistics = {path for path, variable in found.items() if variable.type is nnx.BatchStat}
    adapter = sum(size for path, size in sizes.items() if ".lora." in path)
    base = sum(size for path, size in sizes.items() if ".lora." not in path and path not in statistics)
    assert (base, adapter) == COUNTS[name]
    assert sum(sizes[path] for path in statistics) == PUBLISHED[name].encoder.num_layers * 4096


def test_a_published_config_survives_hugging_face():
    for config in PUBLISHED.values():
        assert type(config).from_hf(*config.to_hf()) == config
