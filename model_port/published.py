# SPDX-License-Identifier: Apache-2.0
"""The released models by name, from their config files and model cards."""

import dataclasses

from model_port.config import DecoderConfig, EncoderConfig, GraniteSpeechConfig, LoraConfig, ProjectorConfig


def _published() -> dict[str, GraniteSpeechConfig]:
    encoder = EncoderConfig(num_layers=16, output_dim=256)
    first_encoder = EncoderConfig(num_layers=10, output_dim=42)
    granite4_encoder = EncoderConfig(num_layers=16, output_dim=348)
    projector = ProjectorConfig(
        hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, intermediate_size=4096, encoder_hidden_size=1024
    )
    common = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "num_hidden_layers": 40}
    text_2b = DecoderConfig(
        vocab_size=49160,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        rope_theta=1e7,
        attention_multiplier=1 / 64,
        logits_scaling=8.0,
        max_position_embeddings=131072,
        **common,
    )
    text_8b = dataclasses.replace(
        text_2b, hidden_size=4096, intermediate_size=12800, attention_multiplier=1 / 128, logits_scaling=16.0
    )
    text_1b = DecoderConfig(
        vocab_size=100353,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=4096,
        rope_theta=1e4,
        attention_multiplier=1 / 128,
        logits_scaling=8.0,
        max_position_embeddings=4096,
        **common,
    )
    granite3 = {"lora": LoraConfig(), "audio_token_id": 49159}
    granite4 = {"audio_token_id": 100352, "eos_token_ids": (100257,), "pad_token_id": 100256}
    plus = {
        "encoder": dataclasses.replace(granite4_encoder, cat_hidden_layers=(3,)),
        "projector": dataclasses.replace(projector, encoder_hidden_size=2048),
    }
    return {
        "granite-speech-3.2-8b": GraniteSpeechConfig(
            first_encoder, projector, dataclasses.replace(text_8b, vocab_size=49156), LoraConfig(), audio_token_id=49155
        ),
        "granite-speech-3.3-2b": GraniteSpeechConfig(encoder, projector, text_2b, **granite3),
        "granite-speech-3.3-8b": GraniteSpeechConfig(encoder, projector, text_8b, **granite3),
        "granite-speech-3.3-2b-first": GraniteSpeechConfig(first_encoder, projector, text_2b, **granite3),
        "granite-speech-3.3-8b-first": GraniteSpeechConfig(first_encoder, projector, text_8b, **granite3),
        "granite-4.0-1b-speech": GraniteSpeechConfig(
            granite4_encoder, projector, text_1b, tie_word_embeddings=False, **granite4
        ),
        "granite-speech-4.1-2b": GraniteSpeechConfig(
            granite4_encoder, projector, text_1b, tie_word_embeddings=False, **granite4
        ),
        "granite-speech-4.1-2b-plus": GraniteSpeechConfig(decoder=text_1b, **plus, **granite4),
    }


PUBLISHED = _published()
