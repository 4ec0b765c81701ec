# SPDX-License-Identifier: Apache-2.0
"""Whether a converted model is the one that it was made from: bit for bit, and stage by stage against PyTorch."""

import dataclasses
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.weights import convert, hf_files, names, tree
from model_port.weights.comparison import PROMPT, Options, Stage, compare_models
from model_port.weights.config_files import COPIED
from model_port.weights.inspection import COMPONENTS, component_of
from model_port.weights.lazy import cast, contiguous, layers


@dataclass
class Tensors:
    """The tensors of one component, compared bit for bit.

    Attributes:
        differ: names of those that are not equal.
        largest: the largest difference in any of them.
    """

    equal: int = 0
    differ: list[str] = field(default_factory=list)
    largest: float = 0.0


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        settings: how the source was changed before the comparison, and whatever else a reader has to know.
        tensors: by component.
        stages: in order; empty where none was compared.
        problems: what differs besides values, by kind.
        remarks: on the stages.
    """

    src: str
    checkpoint: str
    settings: list[str]
    tensors: dict[str, Tensors]
    stages: list[Stage]
    problems: dict[str, list[str]]
    remarks: list[str]

    @property
    def passed(self) -> bool:
        """Whether everything that was compared is equal, or within its tolerance."""
        differ = any(part.differ for part in self.tensors.values()) or any(self.problems.values())
        return not differ and all(stage.ok is not False for stage in self.stages)

    def text(self) -> str:
        """Return the findings as tables."""
        lines = [f"{self.src}", f"against {self.checkpoint}", *(f"  {line}" for line in self.settings), ""]
        lines.append(f"  {'tensors of the':<22}{'equal':>8}{'differ':>8}  largest difference")
        for name, part in self.tensors.items():
            largest = f"{part.largest:.1e}" if part.differ else "0"
            lines.append(f"  {name:<22}{part.equal:>8}{len(part.differ):>8}  {largest}")
            lines += tree.listed({"    differ": part.differ})
        lines += tree.listed(self.problems)
        if self.stages:
            lines += ["", f"  {'stage':<14}{'difference':>22}{'allowed':>9}"]
            lines += [stage.line() for stage in self.stages]
        lines += [f"  {remark}" for remark in self.remarks]
        return "\n".join([*lines, "", "passed" if self.passed else "DIFFERS"])


def verify(
    src: str | os.PathLike,
    checkpoint: str | os.PathLike,
    *,
    audio: str | os.PathLike | None = None,
    prompt: str = PROMPT,
    dtype: str = "float32",
    max_new_tokens: int = 16,
    stages: bool = True,
) -> Verification:
    """Compare a model directory with the Hugging Face directory that it was made from.

    Every tensor is compared bit for bit, with the source cast and its adapter merged as the checkpoint has it. Where
    torch and transformers are installed, both models run on one clip, and what comes out of every stage is compared.
    Memory: one stacked parameter for the tensors, then one whole model in `dtype` after the other.

    Args:
        checkpoint: an Orbax model directory, or another Hugging Face directory, e.g. an export.
        audio: a clip; by default noise of 4.8 s.
        prompt: user message; of a model without a tokenizer, the prompt is random ids.
        dtype: in which both models compute.
        stages: whether to run the models.

    Raises:
        UserError: a directory that cannot be read, or an option out of range.
    """
    if dtype not in convert.DTYPES or max_new_tokens < 1:
        raise UserError(
            f"dtype must be one of {', '.join(convert.DTYPES)} and max_new_tokens at least 1; "
            f"got {dtype!r} and {max_new_tokens}"
        )
    if convert.directory_kind(src) != "hf":
        raise UserError(f"{src} is no Hugging Face directory; give the source first, then what was made from it")
    original, files = convert.open_model(src)
    config, arrays = convert.open_model(checkpoint)
    lora = _fate_of_adapter(src, original, config, arrays)
    expected, source = convert.open_model(src, lora=lora)
    raw = hf_files.survey(src, adapter=lora == "keep").found
    adapted = {name.replace(".lora.a", ".kernel") for name in files if name.endswith(".lora.a")}
    tensors = _compare_tensors(source, arrays, raw, folded=adapted if lora == "merge" else ())
    problems = {
        **{kind: found for kind, found in tree.compare(expected, arrays).items() if kind != "wrong shape"},
        "setting": _differing_settings(expected, config),
        "file": _differing_files(src, checkpoint),
    }
    compared, remarks = [], ["stages not compared: not asked for"]
    if tree.shapes(expected) != {name: tuple(array.shape) for name, array in arrays.items()}:
        remarks = ["stages not compared: the models have other shapes"]
    elif stages:
        options = Options(dtype=dtype, max_new_tokens=max_new_tokens, audio=audio, prompt=prompt)
        dtypes = {name: np.dtype(array.dtype) for name, array in arrays.items()}
        compared, remarks = compare_models(src, checkpoint, original, lora=lora, dtypes=dtypes, options=options)
    return Verification(
        src=os.fspath(src),
        checkpoint=os.fspath(checkpoint),
        settings=_settings(source, arrays, lora),
        tensors=tensors,
        stages=compared,
        problems=problems,
        remarks=remarks,
    )


# ---- tensors


def _fate_of_adapter(
    src: str | os.PathLike, original: GraniteSpeechConfig, config: GraniteSpeechConfig, arrays: Mapping[str, Any]
) -> str:
    """Return what became of the source's adapter on its way: keep, merge, or none if the kernels are the base's."""
    if original.lora is None or config.lora is not None:
        return "keep"
    _, base = convert.open_model(src, lora="none")
    _, merged = convert.open_model(src, lora="merge")
    changed = next(name for name in base if name.endswith(f"{original.lora.target_modules[0]}.kernel"))
    ours, *candidates = (
        next(iter(layers(held[changed], stacked=True))).astype(np.float32) for held in (arrays, base, merged)
    )
    if any(ours.shape != candidate.shape for candidate in candidates):
        return "merge"
    without, folded = (np.abs(ours - candidate).max() for candidate in candidates)
    return "none" if without < folded else "merge"


def _compare_tensors(
    source: Mapping[str, Any],
    arrays: Mapping[str, Any],
    raw: Mapping[hf_files.Slot, hf_files.Stored],
    *,
    folded: Collection[str],
) -> dict[str, Tensors]:
    """Compare every tensor of the source's files with our array, mapped back to the layout of those files.

    Args:
        raw: the tensors of the files.
        folded: the kernels that the adapter was added to.
    """
    parts = {name: Tensors() for name in COMPONENTS}
    for entry in names.TABLE:
        if entry.path not in source or entry.path not in arrays:
            continue
        part, array = parts[component_of(entry.path)], arrays[entry.path]
        if tuple(source[entry.path].shape) != tuple(array.shape):
            part.differ.append(f"{entry.name} {tuple(source[entry.path].shape)} and {tuple(array.shape)}")
            continue
        stored = _stored(entry, tuple(array.shape), raw)
        if entry.path in folded:
            # It stands in no file, and its last bit is that of the machine that added it up.
            stored = (entry.transform.write(layer) for layer in layers(source[entry.path], stacked=True))
        for layer, (one, other) in enumerate(zip(stored, layers(array, stacked=entry.stacked), strict=True)):
            other = entry.transform.write(other)
            difference = _difference(one, other, name=entry.path, rounded=entry.path in folded)
            if difference is None:
                part.equal += 1
            else:
                part.differ.append(entry.name.format(l=layer))
                part.largest = float(np.maximum(part.largest, difference))  # keeps a NaN
    return {name: part for name, part in parts.items() if part.equal or part.differ}


def _stored(
    entry: names.Entry, shape: tuple[int, ...], raw: Mapping[hf_files.Slot, hf_files.Stored]
) -> Iterator[np.ndarray]:
    for layer in range(shape[0]) if entry.stacked else (None,):
        yield raw[entry.path, layer].read()


def _difference(one: np.ndarray, other: np.ndarray, *, name: str, rounded: bool) -> float | None:
    """Return the largest difference between two tensors, or None if they are equal once `one` is cast.

    Args:
        rounded: whether two units in the last place count as equal.
    """
    one, other = contiguous(cast(one, other.dtype, name)), contiguous(other)
    bits = f"u{other.dtype.itemsize}"
    if np.array_equal(one.view(bits), other.view(bits)):
        return None
    one, difference = np.abs(one.astype(np.float32)), np.abs(one.astype(np.float32) - other.astype(np.float32))
    allowed = 2 * float(jnp.finfo(other.dtype).eps) * one + 1e-6 * one.max()
    return None if rounded and bool((difference <= allowed).all()) else float(difference.max())


def _differing_settings(expected: GraniteSpeechConfig, config: GraniteSpeechConfig) -> list[str]:
    one, other = (_flat(dataclasses.asdict(side)) for side in (expected, config))
    return [
        f"{name} is {one.get(name)!r} and {other.get(name)!r}"
        for name in sorted(one | other)
        if one.get(name) != other.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _differing_files(src: str | os.PathLike, checkpoint: str | os.PathLike) -> list[str]:
    """Name the tokenizer and processor files of the source that the checkpoint lacks or has otherwise."""
    here, there = epath.Path(src), epath.Path(checkpoint)
    differing = []
    for file in (file for pattern in COPIED for file in here.glob(pattern) if file.is_file()):
        copy = there / file.name
        if not copy.exists():
            differing.append(f"{file.name} is absent")
        elif copy.read_bytes() != file.read_bytes():
            differing.append(f"{file.name} has another content")
    return differing


def _settings(source: Mapping[str, Any], arrays: Mapping[str, Any], lora: str) -> list[str]:
    """Say how the source was changed before it was compared."""
    casts = Counter(
        f"{source[name].dtype} to {array.dtype}"
        for name, array in arrays.items()
        if name in source and source[name].dtype != array.dtype
    )
    adapter = {
        "merge": ["the source's adapter is merged into its kernels, as in the checkpoint"],
        "none": ["the source's adapter is left out, as in the checkpoint"],
    }
    lines = [f"the source's weights are cast from {cast}, as in the checkpoint" for cast in casts]
    return adapter.get(lora, []) + lines or ["as stored: no cast, no merge"]
