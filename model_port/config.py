# SPDX-License-Identifier: Apache-2.0
"""What a Granite Speech model is: frozen configs, read from and written to Hugging Face's config.json.

Field names and defaults are Hugging Face's: config.json files leave out what equals the default, so a default
of ours would silently be another model. The published models stand by name in model_port.published.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from model_port.errors import UserError


@dataclass(frozen=True)
class EncoderConfig:
    """Conformer CTC encoder. Source: transformers GraniteSpeechEncoderConfig."""

    input_dim: int = 160
    hidden_dim: int = 1024
    num_layers: int = 10
    num_heads: int = 8
    dim_head: int = 128
    feedforward_mult: int = 4
    output_dim: int = 42
    context_size: int = 200
    max_pos_emb: int = 512
    conv_kernel_size: int = 15
    conv_expansion_factor: int = 2
    cat_hidden_layers: tuple[int, ...] = ()

    @property
    def embedding_dim(self) -> int:
        """Width of what the encoder returns: the last layer, with any `cat_hidden_layers` in front of it."""
        return self.hidden_dim * (len(self.cat_hidden_layers) + 1)


@dataclass(frozen=True)
class ProjectorConfig:
    """Windowed Q-Former. Source: transformers Blip2QFormerConfig and GraniteSpeechConfig."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    encoder_hidden_size: int = 1408
    layer_norm_eps: float = 1e-12
    window_size: int = 15
    downsample_rate: int = 5

    @property
    def num_queries(self) -> int:
        """Embeddings per window."""
        return self.window_size // self.downsample_rate

    def num_slots(self, frames: int) -> int:
        """Audio embeddings for `frames` stacked frames; the last window may be partly empty."""
        return self.num_queries * -(-frames // self.window_size)


@dataclass(frozen=True)
class DecoderConfig:
    """Granite language model. Source: transformers GraniteConfig.

    Attributes:
        vocab_padding: rows that embedding and head have in memory beyond the vocabulary, so that a mesh divides them:
            never sampled, counted or written. Not part of config.json.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    intermediate_size: int = 11008
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    logits_scaling: float = 1.0
    max_position_embeddings: int = 2048
    vocab_padding: int = 0

    @property
    def head_dim(self) -> int:
        """Width of one attention head; Granite has no separate setting for it."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter on linear layers of the decoder, as PEFT stores it."""

    rank: int = 64
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def scaling(self) -> float:
        """The factor on B A x."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class GraniteSpeechConfig:
    """The whole model. Source: transformers GraniteSpeechConfig."""

    encoder: EncoderConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    lora: LoraConfig | None = None
    audio_token_id: int = 49155
    eos_token_ids: tuple[int, ...] = (0,)
    pad_token_id: int = 0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        _check(self)

    @classmethod
    def from_hf(cls, config: dict[str, Any], adapter: dict[str, Any] | None = None) -> "GraniteSpeechConfig":
        """Read the dicts of config.json and, if the directory has one, adapter_config.json.

        Raises:
            UserError: another model, or a setting that this implementation does not compute.
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise UserError(f"config.json describes model_type {kind!r}; supported are {', '.join(MODEL_TYPES)}")
        text, encoder, projector = (config.get(k) for k in ("text_config", "encoder_config", "projector_config"))
        if not (text and encoder and projector):
            raise UserError("config.json lacks text_config, encoder_config or projector_config")
        _refuse(text, TEXT_FIXED, "text_config")
        llm_dim, hidden_size = projector.get("llm_dim"), text.get("hidden_size", DecoderConfig.hidden_size)
        if llm_dim not in (None, hidden_size):
            raise UserError(f"projector_config.llm_dim is {llm_dim}; it must be text_config.hidden_size {hidden_size}")
        config = native(config)
        projector = config["projector_config"]
        _refuse(projector, PROJECTOR_FIXED, "projector_config")
        eos = text.get("eos_token_id", config.get("eos_token_id", 2))
        eos = tuple(eos) if isinstance(eos, list) else (eos,)
        pad = text.get("pad_token_id")
        defaults = EncoderConfig()
        width, heads = encoder.get("hidden_dim", defaults.hidden_dim), encoder.get("num_heads", defaults.num_heads)
        return cls(
            encoder=_pick(
                EncoderConfig,
                encoder,
                dim_head=encoder.get("dim_head") or width // heads,
                cat_hidden_layers=tuple(sorted(encoder.get("cat_hidden_layers") or ())),
            ),
            projector=_pick(
                ProjectorConfig,
                projector,
                window_size=config.get("window_size", 15),
                downsample_rate=config.get("downsample_rate", 5),
            ),
            decoder=_pick(
                DecoderConfig,
                text,
                rope_theta=_rope_theta(text),
                num_key_value_heads=text.get("num_key_value_heads") or text.get("num_attention_heads", 32),
            ),
            lora=_read_adapter(adapter) if adapter else None,
            audio_token_id=config.get("audio_token_index", config.get("audio_token_id", 49155)),
            eos_token_ids=eos,
            pad_token_id=eos[0] if pad is None else pad,
            tie_word_embeddings=config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)),
        )

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return the dicts of config.json and adapter_config.json (None without an adapter)."""
        encoder = {"model_type": "granite_speech_encoder", **dataclasses.asdict(self.encoder)}
        cat = encoder.pop("cat_hidden_layers")
        plus = {"cat_hidden_layers": list(cat)} if cat else {}
        projector = {
            "model_type": "blip_2_qformer",
            **dataclasses.asdict(self.projector),
            "cross_attention_frequency": 1,
        }
        window_size, downsample_rate = projector.pop("window_size"), projector.pop("downsample_rate")
        decoder = dataclasses.asdict(self.decoder)
        del decoder["vocab_padding"]
        text = {
            "model_type": "granite",
            **decoder,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "bos_token_id": self.eos_token_ids[0],
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        suffix = "_plus" if plus else ""
        config = {
            "architectures": [f"GraniteSpeech{'Plus' if plus else ''}ForConditionalGeneration"],
            "model_type": f"granite_speech{suffix}",
            "audio_token_index": self.audio_token_id,
            "downsample_rate": downsample_rate,
            "window_size": window_size,
            "has_lora_adapter": self.lora is not None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "encoder_config": {**encoder, **plus, "model_type": f"granite_speech{suffix}_encoder"},
            "projector_config": projector,
            "text_config": text,
        }
        return config, _write_adapter(self.lora) if self.lora else None

    def padded(self, multiple: int) -> "GraniteSpeechConfig":
        """Return the config of the same model with embedding and head of a multiple of so many rows; 1 pads nothing."""
        padding = -self.decoder.vocab_size % multiple
        return dataclasses.replace(self, decoder=dataclasses.replace(self.decoder, vocab_padding=padding))

    @classmethod
    def tiny(cls, **changes) -> "GraniteSpeechConfig":
        """A model of a few thousand parameters for tests; `changes` replace top-level fields."""
        base = cls(
            encoder=EncoderConfig(
                hidden_dim=32,
                num_layers=4,
                num_heads=4,
                dim_head=8,
                feedforward_mult=2,
                output_dim=11,
                context_size=20,
                max_pos_emb=32,
                conv_kernel_size=7,
            ),
            projector=ProjectorConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=32
            ),
            decoder=DecoderConfig(
                vocab_size=128,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                rms_norm_eps=1e-5,
                embedding_multiplier=6.0,
                residual_multiplier=0.4,
                attention_multiplier=0.2,
                logits_scaling=3.0,
                max_position_embeddings=512,
            ),
            lora=LoraConfig(rank=4, alpha=8.0),
            audio_token_id=127,
        )
        return dataclasses.replace(base, **changes)


MODEL_TYPES = ("granite_speech", "granite_speech_plus")

# Settings that the published family never changes: (the only supported value, what an absent key means).
TEXT_FIXED = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "rope_scaling": (None, None),
}
PROJECTOR_FIXED = {
    "hidden_act": ("gelu", "gelu"),
    "cross_attention_frequency": (1, 2),
    "use_qformer_text_input": (False, False),
}


# The projector of granite-speech-3.2-8b, whose config belongs to code of its own.
REMOTE_PROJECTOR = "granite_speech_qformer"


def native(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json as the classes of transformers write it; only that of granite-speech-3.2-8b differs.

    That one keeps window and rate in the projector, which is otherwise the Q-Former of BLIP-2.
    """
    projector = config.get("projector_config") or {}
    if projector.get("model_type") != REMOTE_PROJECTOR:
        return config
    kept = {key: value for key, value in projector.items() if key not in ("window_size", "downsample_rate", "llm_dim")}
    return {
        **{key: value for key, value in config.items() if key != "auto_map"},
        "window_size": projector.get("window_size", 15),
        "downsample_rate": projector.get("downsample_rate", 5),
        "projector_config": {"cross_attention_frequency": 1, **kept, "model_type": "blip_2_qformer"},
    }


def _check(config: GraniteSpeechConfig) -> None:
    encoder, projector, decoder = config.encoder, config.projector, config.decoder
    outside = [i for i in encoder.cat_hidden_layers if not 0 <= i < encoder.num_layers]
    for wrong, rule, given in (
        (
            projector.encoder_hidden_size != encoder.embedding_dim,
            f"projector encoder_hidden_size must be the encoder's output width {encoder.embedding_dim}",
            projector.encoder_hidden_size,
        ),
        (
            projector.window_size % projector.downsample_rate,
            "window_size must be a multiple of downsample_rate",
            (projector.window_size, projector.downsample_rate),
        ),
        (
            decoder.num_attention_heads % decoder.num_key_value_heads,
            "num_attention_heads must be a multiple of num_key_value_heads",
            (decoder.num_attention_heads, decoder.num_key_value_heads),
        ),
        (
            decoder.hidden_size % decoder.num_attention_heads,
            "hidden_size must be a multiple of num_attention_heads",
            (decoder.hidden_size, decoder.num_attention_heads),
        ),
        (
            not 0 <= config.audio_token_id < decoder.vocab_size,
            f"audio_token_index must lie in the vocabulary of {decoder.vocab_size}",
            config.audio_token_id,
        ),
        (
            encoder.context_size > encoder.max_pos_emb,
            "context_size must not exceed max_pos_emb",
            (encoder.context_size, encoder.max_pos_emb),
        ),
        (outside, f"cat_hidden_layers must lie in 0 .. {encoder.num_layers - 1}", outside),
    ):
        if wrong:
            raise UserError(f"model config: {rule}; got {given}")


def _pick(cls, values: dict[str, Any], **overrides):
    """Build `cls` from the entries of a Hugging Face dict that it knows; absent ones keep the class default."""
    names = {field.name for field in dataclasses.fields(cls)}
    known = {name: value for name, value in values.items() if name in names and value is not None}
    return cls(**{**known, **overrides})


def _refuse(values: dict[str, Any], fixed: dict[str, Any], where: str) -> None:
    for name, (supported, default) in fixed.items():
        if values.get(name, default) != supported:
            raise UserError(f"{where}.{name} is {values.get(name, default)!r}; only {supported!r} is supported")


def _rope_theta(text: dict[str, Any]) -> float:
    """RoPE base; files written by transformers 4 and 5 keep it in different places."""
    parameters = text.get("rope_parameters") or {}
    if parameters.get("rope_type", "default") != "default":
        raise UserError(
            f"text_config.rope_parameters has rope_type {parameters['rope_type']!r}; only 'default' is supported"
        )
    return float(parameters.get("rope_theta") or text.get("rope_theta") or 10000.0)


def _read_adapter(adapter: dict[str, Any]) -> LoraConfig:
    for name in ("use_rslora", "use_dora"):
        if adapter.get(name):
            raise UserError(f"adapter_config.json sets {name}; only plain LoRA is supported")
    if adapter.get("bias", "none") != "none":
        raise UserError(f"adapter_config.json has bias {adapter['bias']!r}; only 'none' is supported")
    targets = adapter.get("target_modules")
    if not isinstance(targets, list) or not set(targets) <= set(LORA_TARGETS):
        raise UserError(f"adapter_config.json targets {targets!r}; supported are lists of {', '.join(LORA_TARGETS)}")
    return LoraConfig(rank=adapter["r"], alpha=adapter["lora_alpha"], target_modules=tuple(sorted(targets)))


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _write_adapter(lora: LoraConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
