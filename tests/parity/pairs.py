"""Pairs of models with the same random weights, one in transformers and one of ours, and the reference's outputs."""

import dataclasses

import numpy as np
import torch
import transformers
from packaging.version import Version

from model_port.config import (
    LORA_TARGETS,
    DecoderConfig,
    EncoderConfig,
    GraniteSpeechConfig,
    LoraConfig,
    ProjectorConfig,
)
from model_port.weights.convert import load_model
from tests.hf_tiny import make_hf_model, save_hf_dir

# No two sizes that could be confused are equal, every multiplier differs from 1, and every epsilon is large enough to
# be seen.
LORA = GraniteSpeechConfig(
    encoder=EncoderConfig(
        hidden_dim=24,
        num_layers=4,
        num_heads=3,
        dim_head=10,
        feedforward_mult=3,
        output_dim=11,
        context_size=20,
        max_pos_emb=26,
        conv_kernel_size=7,
    ),
    projector=ProjectorConfig(
        hidden_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=44,
        encoder_hidden_size=24,
        layer_norm_eps=1e-3,
    ),
    decoder=DecoderConfig(
        vocab_size=97,
        hidden_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=52,
        rope_theta=1e5,
        rms_norm_eps=1e-3,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.25,
        logits_scaling=3.0,
        max_position_embeddings=512,
    ),
    lora=LoraConfig(rank=4, alpha=6.0),
    audio_token_id=96,
)
ALL_LINEAR = LoraConfig(rank=3, alpha=6.0, target_modules=LORA_TARGETS)
UNTIED = dataclasses.replace(LORA, lora=ALL_LINEAR, tie_word_embeddings=False)
# Layer 0 is the input projection; layer 2 of 4 is the middle one, whose export contains the CTC feedback.
PLUS = dataclasses.replace(
    LORA,
    encoder=dataclasses.replace(LORA.encoder, cat_hidden_layers=(0, 2, 3)),
    projector=dataclasses.replace(LORA.projector, encoder_hidden_size=4 * 24),
    lora=None,
)

# What several adapters with large random weights leave of float32 in the logits.
LOGITS = 3e-5

# transformers 5.10 to 5.23 return lm_head(hidden) without the division by logits_scaling.
DIVIDES = Version(transformers.__version__) < Version("5.10")


def make_pair(config, path, seed=0):
    """Return (transformers model, our model) with the same weights, by way of a directory as published."""
    model = make_hf_model(config, seed=seed)
    return model, load_model(save_hf_dir(model, path))


def torch_of(array):
    """Return a NumPy or JAX array as a tensor, integers as int64."""
    tensor = torch.tensor(np.asarray(array))
    return tensor if tensor.is_floating_point() else tensor.long()


def hf_audio(model, clip):
    """Return the reference's audio embeddings of one clip [A, 160] by itself."""
    with torch.no_grad():
        return model.get_audio_features(torch_of(clip)[None]).pooler_output[0]


def hf_logits(model, ids, clips):
    """Return the reference's logits [L, V] of one prompt by itself, divided by logits_scaling.

    transformers takes several clips of one length only, so clips of several lengths are embedded one by one and
    written over the placeholders here.
    """
    ids = torch_of(ids)[None]
    with torch.no_grad():
        if len({len(clip) for clip in clips}) == 1:
            out = model(input_ids=ids, input_features=torch.stack([torch_of(clip) for clip in clips]))
        elif not clips:
            out = model(input_ids=ids)
        else:
            audio = ids == model.config.audio_token_id
            embeddings = model.get_input_embeddings()(ids.masked_fill(audio, 0))
            embeddings[audio] = torch.cat([hf_audio(model, clip) for clip in clips])
            out = model(inputs_embeds=embeddings)
    return out.logits[0].numpy() / (1.0 if DIVIDES else model.config.text_config.logits_scaling)
