# SPDX-License-Identifier: Apache-2.0
"""The encoder half of BERT and RoBERTa, read from a Hugging Face directory, for BERTScore.

Post-norm transformer layers with learned positions and the erf form of GELU. Source: transformers BertModel and
RobertaModel (also XLMRobertaModel, which differs in its tokenizer only).

Letters: N texts, L tokens, D width, H heads, h head width, F feed-forward width.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from safetensors import SafetensorError, safe_open

from model_port.errors import UserError

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
_MASKED = -1e30  # finite, so that a row of padding stays finite

# Our name of each linear or norm of a layer → Hugging Face's.
_LAYER_PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
# TensorFlow's names of a norm's parameters, which the first BERT checkpoints keep.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What the computation needs to know beside the parameters.

    Attributes:
        model_type: one of MODEL_TYPES.
        num_layers: in the file; fewer may be run.
        pad_id: token that takes no position of its own (RoBERTa), or None where positions count from 0 (BERT).
        max_tokens: longest text, special tokens included, that there are positions for.
    """

    model_type: str
    num_layers: int
    num_heads: int
    norm_eps: float
    pad_id: int | None
    max_tokens: int


def read_config(directory: Path) -> EncoderConfig:
    """Read config.json.

    Raises:
        UserError: it is missing, or describes another kind of model.
    """
    config = read_json(directory / "config.json")
    model_type = config.get("model_type")
    wanted = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{directory} holds a model of type {model_type!r}; BERTScore runs {', '.join(MODEL_TYPES)}. "
            "Name the directory of one of these in metrics.bertscore_model."
        )
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise UserError(f"{directory}/config.json has {name} {config[name]!r}; BERTScore runs {value!r} only.")
    pad_id = None if model_type == "bert" else config.get("pad_token_id", 1)
    return EncoderConfig(
        model_type=model_type,
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        norm_eps=config.get("layer_norm_eps", 1e-12),
        pad_id=pad_id,
        max_tokens=config["max_position_embeddings"] - (0 if pad_id is None else pad_id + 1),
    )


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object; a UserError names the file that cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {file} ({error}). metrics.bertscore_model must be a Hugging Face directory with config.json, "
            "tokenizer.json and *.safetensors."
        ) from error


def read_params(directory: Path, num_layers: int) -> dict[str, Any]:
    """Read the parameters of the embeddings and the first layers, float32, layers stacked on a leading axis.

    Raises:
        UserError: no safetensors file, or a parameter is missing.
    """
    get = _reader(directory)

    def part(name: str, transpose: bool = False) -> dict[str, np.ndarray]:
        weight = get(f"{name}.weight")
        return {"weight": weight.T if transpose else weight, "bias": get(f"{name}.bias")}

    layers = [
        {
            ours: part(f"encoder.layer.{number}.{theirs}", transpose=not theirs.endswith("LayerNorm"))
            for ours, theirs in _LAYER_PARTS.items()
        }
        for number in range(num_layers)
    ]
    params = {
        "words": get("embeddings.word_embeddings.weight"),
        "positions": get("embeddings.position_embeddings.weight"),
        "first_type": get("embeddings.token_type_embeddings.weight")[0],
        "norm": part("embeddings.LayerNorm"),
    }
    if layers:
        params["layers"] = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
    return jax.tree.map(jnp.asarray, params)


def _reader(directory: Path) -> Callable[[str], np.ndarray]:
    """A function from the name of a parameter, as BertModel has it, to its value."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                found |= {name: file for name in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {file}, it is truncated or no safetensors file ({error}).") from error
    if not found:
        raise UserError(
            f"{directory} has no *.safetensors. BERTScore reads no pytorch_model.bin: load the model with transformers "
            "and save_pretrained it, or download its safetensors."
        )

    def get(name: str) -> np.ndarray:
        names = [name]
        names += [name.replace(new, old) for new, old in _OLD_NAMES.items() if name.endswith(new)]
        for stored in (prefix + name for prefix in ("", "bert.", "roberta.") for name in names):
            if stored in found:
                with safe_open(found[stored], framework="np") as tensors:
                    return tensors.get_tensor(stored).astype(np.float32)
        raise UserError(
            f"the *.safetensors in {directory} have no {name}, with or without bert. or roberta. before it."
        )

    return get


def encode(
    params: dict[str, Any], tokens: Int[Array, "N L"], mask: Bool[Array, "N L"], *, config: EncoderConfig
) -> Float[Array, "N L D"]:
    """The output of the last of the layers in `params`, in full float32; what is not in the mask is meaningless."""
    with jax.default_matmul_precision("highest"):
        x = params["words"][tokens] + params["positions"][_positions(tokens, config.pad_id)]
        x = _norm(params["norm"], x + params["first_type"][None, None], config.norm_eps)
        if "layers" in params:
            x, _ = jax.lax.scan(lambda x, layer: (_layer(layer, x, mask, config), None), x, params["layers"])
        return x


def _positions(tokens: Int[Array, "N L"], pad_id: int | None) -> Int[Array, "N L"]:
    if pad_id is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    real = (tokens != pad_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + pad_id


def _layer(
    layer: dict[str, Any], x: Float[Array, "N L D"], mask: Bool[Array, "N L"], config: EncoderConfig
) -> Float[Array, "N L D"]:
    shape = (*x.shape[:2], config.num_heads, -1)
    query, key, value = (_linear(layer[name], x).reshape(shape) for name in ("query", "key", "value"))
    scores = jnp.einsum("NLHh,NSHh->NHLS", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, _MASKED), axis=-1)
    attended = jnp.einsum("NHLS,NSHh->NLHh", weights, value).reshape(x.shape)
    x = _norm(layer["attention_norm"], x + _linear(layer["attention_out"], attended), config.norm_eps)
    hidden = jax.nn.gelu(_linear(layer["up"], x), approximate=False)
    return _norm(layer["norm"], x + _linear(layer["down"], hidden), config.norm_eps)


def _linear(part: dict[str, Array], x: Float[Array, "N L I"]) -> Float[Array, "N L O"]:
    return x @ part["weight"] + part["bias"][None, None]


def _norm(part: dict[str, Array], x: Float[Array, "N L D"], eps: float) -> Float[Array, "N L D"]:
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps)
    return centred * scale * part["weight"][None, None] + part["bias"][None, None]
