"""The whole model with audio against transformers, which runs every prompt by itself."""

import dataclasses

import numpy as np
import pytest
from transformers import GraniteSpeechFeatureExtractor, GraniteSpeechProcessor

from model_port.processor import Processor, _auto_tokenizer
from tests.invariance.tiny import clip, make_batch
from tests.model_port.toy_tokenizer import make_model_dir
from tests.parity.pairs import LOGITS, LORA, hf_audio, hf_logits, make_pair

pytestmark = pytest.mark.parity

# One clip each, around the context of 20 and the window of 15; two of one length; several lengths; at either end.
PROMPTS = [
    [5, 6, clip(13), 17, 3],
    [5, clip(15), 9],
    [clip(16), 17, 3, 40, 41, 42, 43],
    [5, 6, clip(20), 17],
    [7, clip(21, seed=1), 8, clip(21, seed=2), 9],
    [1, clip(37), 2, clip(1), 3, clip(30), 4],
    [11, 12, 13, clip(45)],
]


def row_of(batch, p):
    """The tokens of one prompt without padding."""
    return batch.tokens[p][batch.mask[p]]


@pytest.mark.parametrize("pair", ["lora", "untied", "plus"])
def test_logits_with_audio(request, close, pair):
    reference, model = request.getfixturevalue(pair)
    batch = make_batch(model.config, PROMPTS, frames=50, tokens=40, garbage=30.0)
    logits = model(batch)
    for p, prompt in enumerate(PROMPTS):
        clips = [item for item in prompt if not isinstance(item, int)]
        expected = hf_logits(reference, row_of(batch, p), clips)
        close(f"logits with audio, {pair}", logits[p, : len(expected)], expected, LOGITS)


def test_audio_embeddings(lora, close):
    reference, model = lora
    batch = make_batch(model.config, PROMPTS, frames=50, garbage=30.0)
    embeddings, mask = model.encode_audio(batch)
    assert embeddings.shape[1] == 3 * model.config.projector.num_slots(50)
    for p, prompt in enumerate(PROMPTS):
        clips = [item for item in prompt if not isinstance(item, int)]
        expected = np.concatenate([hf_audio(reference, c) for c in clips])
        close("audio embeddings", np.asarray(embeddings)[p][np.asarray(mask)[p]], expected)


def test_from_waveforms(tmp_path, close):
    """Front end, template, tokenizer, placeholders and model at once; the mel frames are odd and even in number."""
    path = make_model_dir(tmp_path)
    processor = Processor.from_pretrained(path)
    tokenizer = _auto_tokenizer().from_pretrained(path)
    config = dataclasses.replace(
        LORA, decoder=dataclasses.replace(LORA.decoder, vocab_size=320), audio_token_id=processor.audio_id
    )
    reference, model = make_pair(config, tmp_path / "weights")
    oracle = GraniteSpeechProcessor(GraniteSpeechFeatureExtractor(), tokenizer)
    rng = np.random.default_rng(0)
    waves = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in (16000, 4321, 7040, 6879)]
    assert {len(wave) // 160 % 2 for wave in waves} == {0, 1}
    users = ["<|audio|>can you transcribe the speech?", "translate: <|audio|>", "<|audio|> x", "what is <|audio|>?"]
    batch = processor(audio=waves, prompts=users, system="You are Granite.")
    logits = model(batch)
    for p, (user, wave) in enumerate(zip(users, waves, strict=True)):
        roles = [{"role": "system", "content": "You are Granite."}, {"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(roles, tokenize=False, add_generation_prompt=True)
        inputs = oracle([text], [wave], return_tensors="np")
        expected = hf_logits(reference, inputs["input_ids"][0], [inputs["input_features"][0]])
        close("logits from waveforms", logits[p, : len(expected)], expected, LOGITS)
