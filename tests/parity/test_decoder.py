"""The Granite decoder and the logits against transformers; adapter on and off, head tied and untied."""

import dataclasses

import numpy as np
import pytest
import torch

from model_port.params import split_model
from model_port.weights.convert import build_model
from tests.invariance.tiny import make_batch
from tests.parity.pairs import DIVIDES, LOGITS, hf_logits

pytestmark = pytest.mark.parity

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(1, 90, size).tolist() for size in (11, 1, 19)]


@pytest.mark.parametrize("pair", ["lora", "untied"])
@pytest.mark.parametrize("adapter", [True, False])
def test_logits_of_text(request, close, pair, adapter):
    reference, model = request.getfixturevalue(pair)
    (reference.enable_adapters if adapter else reference.disable_adapters)()
    try:
        expected = [hf_logits(reference, prompt, []) for prompt in PROMPTS]
    finally:
        reference.enable_adapters()
    batch = make_batch(model.config, PROMPTS)
    logits = model(batch, use_lora=adapter)
    for p, row in enumerate(expected):
        close(f"text logits, {pair}{'' if adapter else ' off'}", logits[p, : len(row)], row, LOGITS)


def test_the_adapter_is_off_without_audio(lora, close):
    """As in transformers' generate, which switches by the presence of audio."""
    reference, model = lora
    batch = make_batch(model.config, PROMPTS)
    off = model(batch, use_lora=False)
    np.testing.assert_array_equal(model(batch), off)
    assert np.abs(model(batch, use_lora=True) - off)[0, : len(PROMPTS[0])].max() > 0.1
    with torch.no_grad():
        tokens = reference.generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=1, return_dict_in_generate=True, output_logits=True
        )
    reference.enable_adapters()
    scale = 1.0 if DIVIDES else model.config.decoder.logits_scaling
    close("text logits, lora off", off[0, len(PROMPTS[0]) - 1], tokens.logits[0][0] / scale)


def test_the_adapter_counts_with_its_scaling(lora):
    """alpha / r, so 1.5 here; 1 would be another model."""
    _, model = lora
    config = dataclasses.replace(model.config, lora=dataclasses.replace(model.config.lora, alpha=4.0))
    other = build_model(config, dict(split_model(model)[1]))
    batch = make_batch(model.config, PROMPTS)
    assert np.abs(model(batch, use_lora=True) - other(batch, use_lora=True)).max() > 1e-2


@pytest.mark.parametrize("pair", ["lora", "untied"])
def test_logits_scaling_divides_the_logits(request, pair):
    """Fault 1: transformers 5.10 to 5.23 read the setting and do not use it."""
    _, model = request.getfixturevalue(pair)
    decoder = dataclasses.replace(model.config.decoder, logits_scaling=2 * model.config.decoder.logits_scaling)
    half = build_model(dataclasses.replace(model.config, decoder=decoder), dict(split_model(model)[1]))
    batch = make_batch(model.config, PROMPTS)
    logits = np.asarray(model(batch))
    assert np.abs(logits[batch.mask]).max() > 1
    np.testing.assert_array_equal(half(batch), logits / 2)
