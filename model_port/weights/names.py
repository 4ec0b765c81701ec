# SPDX-License-Identifier: Apache-2.0
"""One table: the tensor names of Hugging Face files against our parameter paths. Both directions come from it.

Hugging Face names are those of published files, which transformers also writes (`encoder.*`, `projector.*`,
`language_model.model.*`); `normalise` brings every other spelling to them. `{l}` stands for the layer number:
on our side the layers of a stack share one array with a leading layer axis.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Layout = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse; neither touches the values."""

    read: Layout
    write: Layout

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in a Hugging Face file of one of our arrays (of one layer, where stacked)."""
        return self.write(np.broadcast_to(np.False_, shape)).shape


@dataclass(frozen=True)
class Entry:
    """One row of the table: `path` of ours, `name` in Hugging Face files."""

    path: str
    name: str
    transform: Transform

    @property
    def stacked(self) -> bool:
        """Whether our array holds all layers along its first axis."""
        return "{l}" in self.name


SAME = Transform(lambda w: w, lambda x: x)
# torch.nn.Linear stores (out, in).
TRANSPOSED = Transform(lambda w: w.T, lambda x: x.T)
# A convolution of width 1 (out, in, 1) is a linear layer.
POINTWISE = Transform(lambda w: w[:, :, 0].T, lambda x: x.T[:, :, None])
# Depthwise (channels, 1, width) -> (width, channels).
DEPTHWISE = Transform(lambda w: w[:, 0, :].T, lambda x: x.T[:, None, :])
# Two linear layers in one tensor, the first half of the rows then the second, (2 * out, in) -> (in, 2, out):
# keys then values in to_kv, value then gate in up_conv.
PAIR = Transform(
    lambda w: w.reshape(2, -1, w.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
)
POINTWISE_PAIR = Transform(lambda w: PAIR.read(w[:, :, 0]), lambda x: PAIR.write(x)[:, :, None])
VECTOR_PAIR = Transform(lambda w: w.reshape(2, -1), lambda x: x.reshape(-1))

# Kind of module -> our leaf: (its leaf, transform).
KINDS: dict[str, dict[str, tuple[str, Transform]]] = {
    "linear": {"kernel": ("weight", TRANSPOSED)},
    "dense": {"kernel": ("weight", TRANSPOSED), "bias": ("bias", SAME)},
    "layer_norm": {"scale": ("weight", SAME), "bias": ("bias", SAME)},
    "rms_norm": {"scale": ("weight", SAME)},
    "embedding": {"embedding": ("weight", SAME)},
    "key_value": {"kernel": ("weight", PAIR)},
    "glu": {"kernel": ("weight", POINTWISE_PAIR), "bias": ("bias", VECTOR_PAIR)},
    "pointwise": {"kernel": ("weight", POINTWISE), "bias": ("bias", SAME)},
    "depthwise": {"kernel": ("conv.weight", DEPTHWISE)},
    "batch_norm": {
        "scale": ("weight", SAME),
        "bias": ("bias", SAME),
        "mean": ("running_mean", SAME),
        "var": ("running_var", SAME),
    },
    "lora": {"a": ("lora_A.weight", TRANSPOSED), "b": ("lora_B.weight", TRANSPOSED)},
}

ENCODER = "encoder.layers", "encoder.layers.{l}"
QFORMER = "projector.layers", "projector.qformer.encoder.layer.{l}"
DECODER = "decoder.layers", "language_model.model.layers.{l}"

# (our stack, its stack), our module, its module, kind.
LAYERS = (
    *(
        (ENCODER, f"{ff}.{module}", f"{ff}.{module}", kind)
        for ff in ("ff1", "ff2")
        for module, kind in (("pre_norm", "layer_norm"), ("up_proj", "dense"), ("down_proj", "dense"))
    ),
    (ENCODER, "attn.pre_norm", "attn.pre_norm", "layer_norm"),
    (ENCODER, "attn.to_q", "attn.to_q", "linear"),
    (ENCODER, "attn.to_kv", "attn.to_kv", "key_value"),
    (ENCODER, "attn.to_out", "attn.to_out", "dense"),
    (ENCODER, "attn.rel_pos_emb", "attn.rel_pos_emb", "embedding"),
    (ENCODER, "conv.norm", "conv.norm", "layer_norm"),
    (ENCODER, "conv.up_conv", "conv.up_conv", "glu"),
    (ENCODER, "conv.depth_conv", "conv.depth_conv", "depthwise"),
    (ENCODER, "conv.batch_norm", "conv.batch_norm", "batch_norm"),
    (ENCODER, "conv.down_conv", "conv.down_conv", "pointwise"),
    (ENCODER, "post_norm", "post_norm", "layer_norm"),
    *(
        (QFORMER, f"{ours}.{module}", f"{theirs}.attention.{module}", "dense")
        for ours, theirs in (("self_attn", "attention"), ("cross_attn", "crossattention"))
        for module in ("query", "key", "value")
    ),
    (QFORMER, "self_attn.out", "attention.output.dense", "dense"),
    (QFORMER, "self_attn.norm", "attention.output.LayerNorm", "layer_norm"),
    (QFORMER, "cross_attn.out", "crossattention.output.dense", "dense"),
    (QFORMER, "cross_attn.norm", "crossattention.output.LayerNorm", "layer_norm"),
    (QFORMER, "mlp.up", "intermediate_query.dense", "dense"),
    (QFORMER, "mlp.down", "output_query.dense", "dense"),
    (QFORMER, "mlp.norm", "output_query.LayerNorm", "layer_norm"),
    (DECODER, "input_layernorm", "input_layernorm", "rms_norm"),
    (DECODER, "post_attention_layernorm", "post_attention_layernorm", "rms_norm"),
    *(
        (DECODER, f"{ours}{end}", ours, kind)
        for ours in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
        for end, kind in (("", "linear"), (".lora", "lora"))
    ),
)

MODULES = (
    ("encoder.input_linear", "encoder.input_linear", "dense"),
    ("encoder.out", "encoder.out", "dense"),
    ("encoder.out_mid", "encoder.out_mid", "dense"),
    *((f"{ours}.{a}", f"{theirs}.{b}", kind) for (ours, theirs), a, b, kind in LAYERS),
    ("projector.layernorm", "projector.qformer.layernorm", "layer_norm"),
    ("projector.linear", "projector.linear", "dense"),
    ("decoder.embed_tokens", "language_model.model.embed_tokens", "embedding"),
    ("decoder.norm", "language_model.model.norm", "rms_norm"),
    ("lm_head", "language_model.lm_head", "linear"),
)

TABLE = (
    Entry("projector.query", "projector.query", SAME),
    *(
        Entry(f"{ours}.{a}", f"{theirs}.{b}", transform)
        for ours, theirs, kind in MODULES
        for a, (b, transform) in KINDS[kind].items()
    ),
)
BY_PATH = {entry.path: entry for entry in TABLE}
BY_NAME = {entry.name: entry for entry in TABLE}

EMBEDDING = "decoder.embed_tokens.embedding"
LM_HEAD = "lm_head.kernel"

# Module names in memory since transformers 5.10, which some files carry.
_IN_MEMORY = (
    ("model.encoder.", "encoder."),
    ("model.projector.", "projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# A BatchNorm's counter of batches, stored beside its variance.
RUNNING_VAR, COUNTER = "running_var", "num_batches_tracked"
# Counters and constants that torch stores and no computation reads.
_IGNORED = (COUNTER, "attention_dists")

# How the encoder is called in granite-speech-3.2-8b, which came with code of its own: the input layer is number 0 of a
# list of which the blocks are the rest, and each block wraps its parts. Ours, theirs.
_REMOTE_CODE = (
    *(
        (f"{ff}.{ours}.", f"{ff}.fn.{theirs}.")
        for ff in ("ff1", "ff2")
        for ours, theirs in (("pre_norm", "norm"), ("up_proj", "fn.net.0"), ("down_proj", "fn.net.3"))
    ),
    ("attn.pre_norm.", "attn.norm."),
    ("attn.", "attn.fn."),
    ("conv.norm.", "conv.net.0."),
    ("conv.up_conv.", "conv.net.2."),
    ("conv.depth_conv.", "conv.net.4."),
    ("conv.batch_norm.", "conv.net.5."),
    ("conv.down_conv.", "conv.net.7."),
)


def normalise(key: str) -> str | None:
    """Return the published spelling of a tensor name, or None for a tensor that carries no weight.

    Undoes PEFT's `base_model.model.` prefix, `.base_layer` and the adapter's name (`lora_A.default.weight`), which
    transformers 5 leaves in a model saved together with its adapter, the module names of transformers >= 5.10, and
    those of the code that granite-speech-3.2-8b came with.
    """
    if key.endswith(_IGNORED):
        return None
    key = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    key = re.sub(r"\.lora_([AB])\.\w+\.weight$", r".lora_\1.weight", key)
    for memory, published in _IN_MEMORY:
        if key.startswith(memory):
            key = published + key.removeprefix(memory)
            break
    return _from_remote_code(key)


def _from_remote_code(key: str) -> str:
    """Return the published spelling of a name from granite-speech-3.2-8b; other names are returned as they are."""
    number = re.match(r"encoder\.rnn_tr\.(\d+)\.", key)
    if number is None:
        return key
    rest = key[number.end() :]
    if number[1] == "0":
        return f"encoder.input_linear.{rest}"
    for ours, theirs in _REMOTE_CODE:
        if rest.startswith(theirs):
            rest = ours + rest.removeprefix(theirs)
            break
    return f"encoder.layers.{int(number[1]) - 1}.{rest}"


def lookup(name: str) -> tuple[Entry, int | None] | None:
    """Find the row of a normalised name and the layer it speaks of; None if the model has no such tensor."""
    layer = re.search(r"\.layers?\.(\d+)\.", name)
    if layer is None:
        entry = BY_NAME.get(name)
        return (entry, None) if entry and not entry.stacked else None
    entry = BY_NAME.get(f"{name[: layer.start(1)]}{{l}}{name[layer.end(1) :]}")
    return (entry, int(layer[1])) if entry else None


def is_lora(path: str) -> bool:
    """Whether a parameter belongs to the adapter."""
    return ".lora." in path
