# SPDX-License-Identifier: Apache-2.0
"""What a model directory is, from the headers of its files alone: no weights are read."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from etils import epath

from model_port.config import GraniteSpeechConfig, LoraConfig
from model_port.errors import UserError
from model_port.published import PUBLISHED
from model_port.weights import convert, hf_files, names, orbax_files, tree
from model_port.weights.config_files import ADAPTER_CONFIG, read_json
from model_port.weights.lazy import LazyArray

COMPONENTS = ("encoder", "BatchNorm statistics", "projector", "embedding", "decoder", "head", "adapter")

# How a tensor name begins or what it holds, and who wrote it so; the first that fits.
LAYOUTS = (
    (r"^base_model\.model\.|\.base_layer\.", "saved by transformers 5 together with its adapter (base_model.model.*)"),
    (r"^encoder\.rnn_tr\.", "granite-speech-3.2-8b's own code (encoder.rnn_tr.*)"),
    (r"^model\.(encoder|projector|language_model)\.|^lm_head\.", "in memory since transformers 5.10 (model.*)"),
    (r"", "published (encoder.*, projector.*, language_model.*)"),
)
ADAPTER_LAYOUTS = (
    (r"^base_model\.model\.model\.", "as transformers 5 writes it (base_model.model.model.language_model.*)"),
    (r"^base_model\.model\.", "as transformers 4 writes it (base_model.model.language_model.model.*)"),
    (r"", "published (language_model.model.*)"),
)
# What a processor needs: the name of the need, and the files of which any one will do.
NEEDED = (
    ("tokenizer", ("tokenizer.json", "vocab.json")),
    ("tokenizer_config.json", ("tokenizer_config.json",)),
)
TEMPLATES = ("chat_template.jinja", "chat_template.json")
FRONT_END = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Size:
    """Tensors that belong together.

    Attributes:
        tensors: how many, each layer counted.
        dtypes: of the tensors.
    """

    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        path: the directory.
        facts: (what, how it is) in the order of the text.
        sizes: of every component that is there.
        problems: everything that is wrong, by kind.
    """

    path: str
    facts: list[tuple[str, str]]
    sizes: dict[str, Size]
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether all weights are there as config.json asks for them, and no others."""
        return not any(self.problems.values())

    def text(self) -> str:
        """Return the findings as aligned lines."""
        lines = [self.path, *(f"  {what:<11}{how}" for what, how in self.facts), ""]
        lines += [f"  {'component':<22}{'tensors':>8}{'parameters':>17}{'bytes':>17}  dtype"]
        lines += [_row(name, size) for name, size in self.sizes.items()]
        lines += [_row("total", _total(self.sizes.values())), ""]
        if self.sound:
            return "\n".join(
                [*lines, "sound: all weights are there, in the shapes that config.json asks for, and no others"]
            )
        return "\n".join([*lines, "not sound:", *tree.listed(self.problems)])


def inspect(path: str | os.PathLike) -> Inspection:
    """Say what a model directory is and what is wrong with it, from the headers of its files.

    Raises:
        UserError: no model directory, or one whose config, index or checkpoint metadata cannot be read.
    """
    directory = epath.Path(path)
    if _only_adapter(directory):
        return _inspect_adapter(directory)
    kind = convert.directory_kind(path)
    return _inspect_hf(directory) if kind == "hf" else _inspect_orbax(directory)


def component_of(path: str) -> str:
    """Return to which of COMPONENTS one of our parameters belongs."""
    if names.is_lora(path):
        return "adapter"
    if path in (names.EMBEDDING, names.LM_HEAD):
        return "embedding" if path == names.EMBEDDING else "head"
    return "BatchNorm statistics" if re.search(r"batch_norm\.(mean|var)$", path) else path.split(".")[0]


# ---- Hugging Face


def _inspect_hf(directory: epath.Path) -> Inspection:
    doubles: list[str] = []

    def same(one: hf_files.Stored, other: hf_files.Stored) -> bool:
        if hf_files.same_header(one, other):
            doubles.append(str(one))
        return hf_files.same_header(one, other)

    found = hf_files.survey(os.fspath(directory), same=same)
    problems = {**({"files": found.broken} if found.broken else {}), **found.problems}
    base = [stored.key for (name, _), stored in found.found.items() if not names.is_lora(name)]
    adapter = [stored.key for (name, _), stored in found.found.items() if names.is_lora(name)]
    facts = [
        ("kind", "Hugging Face directory"),
        *_describe(found.config),
        *([("", f"adapter keys {_layouts(adapter, ADAPTER_LAYOUTS)}")] if adapter else []),
        ("layout", _layouts(base, LAYOUTS)),
        *_files(directory, found.files),
        *([("twice", f"{_some(doubles)}; whether both are equal shows when they are read")] if doubles else []),
        *_processor_files(directory),
    ]
    return Inspection(path=os.fspath(directory), facts=facts, sizes=_stored_sizes(found.found), problems=problems)


def _stored_sizes(found: Mapping[hf_files.Slot, hf_files.Stored]) -> dict[str, Size]:
    return _sizes((name, stored.shape, stored.dtype, 1) for (name, _), stored in found.items())


def _layouts(keys: Iterable[str], layouts: Iterable[tuple[str, str]]) -> str:
    """Say in which spelling the keys come: every spelling but the published one is of the whole file."""
    counts = Counter(next(text for pattern, text in layouts if re.search(pattern, key)) for key in keys)
    return next((text for _, text in layouts if counts[text]), "no weights")


def _files(directory: epath.Path, used: list[str]) -> list[tuple[str, str]]:
    """Name the files that hold the model, and those that look so and are not read."""
    size = sum(epath.Path(file).stat().length for file in used)
    listed = [os.path.basename(file) for file in used]
    text = ", ".join(listed) or "none"
    if len(listed) > 1:
        text = f"{listed[0]} .. {listed[-1]}, {len(listed)} that the index names"
    facts = [("files", f"{text}, {size:,} bytes")]
    others = sorted(
        file.name for file in directory.glob("*.safetensors") if file.name not in (*listed, hf_files.ADAPTER)
    )
    if others:
        facts.append(("not read", _some(others)))
    return facts


def _some(listed: list[str]) -> str:
    more = f" and {len(listed) - tree.SHOWN} more" if len(listed) > tree.SHOWN else ""
    return ", ".join(listed[: tree.SHOWN]) + more


# ---- Orbax


def _inspect_orbax(directory: epath.Path) -> Inspection:
    config, arrays = orbax_files.open_orbax(directory)
    problems: dict[str, list[str]] = {}
    kind, more = "Orbax model directory", []
    try:
        base = orbax_files.read_manifest(directory).base
    except UserError as error:
        kind, problems["base"] = "Orbax model directory, partial", [str(error)]
    else:
        if base is not None:
            kind += f", partial: it holds {len(arrays)} arrays, its base the others"
            more, arrays, problems = _with_base(directory, arrays)
        if not problems:
            problems = tree.compare(config, arrays)
    facts = [("kind", kind), *more, *_describe(config), *_processor_files(directory)]
    sizes = _sizes(
        (name, tuple(array.shape), array.dtype.name, array.shape[0] if _stacked(name) else 1)
        for name, array in arrays.items()
    )
    return Inspection(path=os.fspath(directory), facts=facts, sizes=sizes, problems=problems)


def _with_base(
    directory: epath.Path, own: dict[str, LazyArray]
) -> tuple[list[tuple[str, str]], dict[str, LazyArray], dict[str, list[str]]]:
    """Return what the base of a partial directory is, the arrays of both, and what is wrong with the base."""
    manifest = orbax_files.read_manifest(directory)
    base = inspect(manifest.base)
    adapter = {"keep": "", "merge": "; its adapter is folded in", "none": "; its adapter is left out"}
    facts = [("base", f"{manifest.base} ({base.facts[0][1]}{adapter[manifest.base_lora]})")]
    if not base.sound:
        return facts, own, {f"base, {what}": found for what, found in base.problems.items()}
    _, rest = convert.open_model(manifest.base, lora=manifest.base_lora)
    return facts, {**rest, **own}, {}


# ---- an adapter alone


def _only_adapter(directory: epath.Path) -> bool:
    others = (hf_files.SINGLE, hf_files.INDEX, orbax_files.MANIFEST)
    return (directory / hf_files.ADAPTER).exists() and not any((directory / name).exists() for name in others)


def _inspect_adapter(directory: epath.Path) -> Inspection:
    """Look at an adapter without its model: every adapted layer needs its A and B, of the rank that is said."""
    if not (directory / ADAPTER_CONFIG).exists():
        raise UserError(f"{directory} has {hf_files.ADAPTER} but no {ADAPTER_CONFIG}, which says its rank and alpha")
    # What an adapter file may say does not depend on the model, so any will do to read it.
    lora = GraniteSpeechConfig.from_hf(
        GraniteSpeechConfig.tiny().to_hf()[0], read_json(directory / ADAPTER_CONFIG)
    ).lora
    problems: dict[str, list[str]] = {}
    broken: list[str] = []
    found = hf_files.scan({os.fspath(directory / hf_files.ADAPTER): None}, problems, broken)
    layers = sorted({layer for _, layer in found if layer is not None})
    wanted = {
        (f"decoder.layers.{'self_attn' if module[0] in 'qkvo' else 'mlp'}.{module}.lora.{leaf}", layer)
        for module in lora.target_modules
        for leaf in "ab"
        for layer in range(layers[-1] + 1 if layers else 0)
    }
    problems |= {
        "files": broken,
        "missing": [f"{names.BY_PATH[name].name.format(l=layer)}" for name, layer in wanted - found.keys()],
        "unexpected": [str(found[slot]) for slot in found.keys() - wanted] + problems.get("unexpected", []),
        "wrong rank": [
            f"{stored} is {stored.shape}, {ADAPTER_CONFIG} says rank {lora.rank}"
            for (name, _), stored in found.items()
            if stored.shape[0 if name.endswith(".a") else -1] != lora.rank
        ],
    }
    facts = [
        ("kind", "LoRA adapter only: the model that it belongs to is elsewhere"),
        ("adapter", _adapter(lora)),
        ("", f"keys {_layouts([stored.key for stored in found.values()], ADAPTER_LAYOUTS)}"),
        ("on", f"decoder layers 0 to {layers[-1]}" if layers else "no layers"),
    ]
    return Inspection(path=os.fspath(directory), facts=facts, sizes=_stored_sizes(found), problems=problems)


# ---- both


def _describe(config: GraniteSpeechConfig) -> list[tuple[str, str]]:
    encoder, projector, decoder = config.encoder, config.projector, config.decoder
    same = [
        name
        for name, known in PUBLISHED.items()
        if (known.encoder, known.projector, known.decoder) == (encoder, projector, decoder)
    ]
    taps = f", layers {', '.join(map(str, encoder.cat_hidden_layers))} in front" if encoder.cat_hidden_layers else ""
    return [
        ("model", f"the architecture of {' and '.join(same)}" if same else "not one of the released architectures"),
        (
            "encoder",
            f"{encoder.num_layers} layers of width {encoder.hidden_dim}, CTC {encoder.output_dim}{taps}",
        ),
        (
            "projector",
            f"{projector.num_hidden_layers} layers of width {projector.hidden_size}, "
            f"{projector.num_queries} embeddings for {projector.window_size} frames",
        ),
        (
            "decoder",
            f"{decoder.num_hidden_layers} layers of width {decoder.hidden_size}, {decoder.num_attention_heads} heads "
            f"over {decoder.num_key_value_heads}, vocabulary {decoder.vocab_size}",
        ),
        ("head", "the embedding (tied)" if config.tie_word_embeddings else "a kernel of its own (untied)"),
        ("adapter", "none" if config.lora is None else _adapter(config.lora)),
    ]


def _adapter(lora: LoraConfig) -> str:
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}"


def _processor_files(directory: epath.Path) -> list[tuple[str, str]]:
    """Say which files for text and audio there are, and which are needed to run the model and are absent."""
    there = [
        name
        for name in ("tokenizer.json", "tokenizer_config.json", *TEMPLATES, *FRONT_END)
        if (directory / name).exists()
    ]
    absent = [what for what, choices in NEEDED if not any((directory / name).exists() for name in choices)]
    config = directory / "tokenizer_config.json"
    inside = config.exists() and "chat_template" in read_json(config)
    if not inside and not any((directory / name).exists() for name in TEMPLATES):
        absent.append("a chat template")
    facts = [("processor", ", ".join(there) or "no files")]
    return [*facts, ("absent", f"{', '.join(absent)}: needed to run the model on text")] if absent else facts


def _stacked(name: str) -> bool:
    return name in names.BY_PATH and names.BY_PATH[name].stacked


def _sizes(tensors: Iterable[tuple[str, tuple[int, ...], str, int]]) -> dict[str, Size]:
    """Add up (path of the parameter, shape, dtype, how many tensors it is) by component."""
    parts: dict[str, list[Size]] = {name: [] for name in COMPONENTS}
    for path, shape, dtype, count in tensors:
        parameters = math.prod(shape)
        parts.setdefault(component_of(path), []).append(
            Size(count, parameters, parameters * _bits(dtype) // 8, (_SHORT.get(dtype, dtype),))
        )
    return {name: _total(sizes) for name, sizes in parts.items() if sizes}


_SHORT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _bits(dtype: str) -> int:
    """Bits of a dtype by its name: BF16, float32, I64, F8_E4M3."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


def _total(sizes: Iterable[Size]) -> Size:
    sizes = list(sizes)
    return Size(
        tensors=sum(size.tensors for size in sizes),
        parameters=sum(size.parameters for size in sizes),
        nbytes=sum(size.nbytes for size in sizes),
        dtypes=tuple(sorted({dtype for size in sizes for dtype in size.dtypes})),
    )


def _row(name: str, size: Size) -> str:
    return f"  {name:<22}{size.tensors:>8}{size.parameters:>17,}{size.nbytes:>17,}  {', '.join(size.dtypes)}"
