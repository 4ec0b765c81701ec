"""The demo's small Granite Speech: its shape and how its weights start."""

import jax
import jax.numpy as jnp
from flax import nnx

from model_port.config import DecoderConfig, EncoderConfig, GraniteSpeechConfig, ProjectorConfig
from model_port.model import GraniteSpeech
from model_port.params import ModelDef, Params, split_model

CONFIG = GraniteSpeechConfig(
    encoder=EncoderConfig(
        hidden_dim=96,
        num_layers=4,
        num_heads=4,
        dim_head=24,
        feedforward_mult=4,
        output_dim=29,
        context_size=50,
        max_pos_emb=100,
        conv_kernel_size=15,
    ),
    projector=ProjectorConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256, encoder_hidden_size=96
    ),
    decoder=DecoderConfig(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        embedding_multiplier=8.0,
        residual_multiplier=0.5,
        attention_multiplier=32**-0.5,
        logits_scaling=1.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
    ),
    audio_token_id=1023,
)
ENCODER_GAIN, OTHER_GAIN = 1.0, 0.7


def initial_model(seed: int) -> tuple[ModelDef, Params]:
    """Return a fresh model; kernels are drawn with standard deviation gain / sqrt(fan in).

    The usual 0.02 is too small at these widths for the first steps to move.
    """
    definition, params = split_model(GraniteSpeech(CONFIG, rngs=nnx.Rngs(seed)))
    keys = jax.random.split(jax.random.key(seed), len(params))
    for key, (name, value) in zip(keys, sorted(params.items()), strict=True):
        if name.endswith(("kernel", "embed_tokens.embedding")):
            stacked = ".layers." in name
            embedding = name.endswith("embedding")
            fan_in = value.shape[-1] if embedding else value.shape[1 if stacked else 0]
            gain = ENCODER_GAIN if name.startswith("encoder.") else OTHER_GAIN
            params[name] = gain * fan_in**-0.5 * jax.random.normal(key, value.shape, jnp.float32)
    return definition, params
