# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories, written in the published layout, tensor by tensor."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from model_port.config import GraniteSpeechConfig
from model_port.weights import names
from model_port.weights.config_files import ADAPTER_CONFIG, read_json, to_json, write_config_files
from model_port.weights.hf_files import ADAPTER, DTYPES, INDEX, SINGLE
from model_port.weights.lazy import contiguous, layers
from model_port.weights.writing import check_space, write_pieces, written_aside

MAX_SHARD_BYTES = 5 * 10**9

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(np.int64): "I64"}
DTYPE_ORDER = [np.dtype(np.int64), DTYPES["F32"], DTYPES["BF16"], DTYPES["F16"]]


@dataclass(frozen=True)
class Spec:
    """A tensor to be written: what a file's header says of it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_hf(
    path: str | os.PathLike,
    config: GraniteSpeechConfig,
    arrays: Mapping[str, Any],
    *,
    source_dir: str | os.PathLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    same_weights: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write {dotted path: array, read or not} as a Hugging Face directory in the published layout, dtypes as given.

    Args:
        source_dir: model directory whose config, tokenizer and processor files are copied.
        max_shard_bytes: above this size the model is split into several files with an index.
        same_weights: whether the weights are the source's, so that its adapter may go on naming the base it names.
        progress: told the bytes of every tensor that is written.

    Raises:
        UserError: `path` exists and is not empty, or it does not fit on its disk.
    """
    entries = [entry for entry in names.TABLE if entry.path in arrays]
    base = [entry for entry in entries if not names.is_lora(entry.path)]
    adapter = [entry for entry in entries if names.is_lora(entry.path)]
    dtype = np.dtype(arrays[names.EMBEDDING].dtype).name
    with written_aside(path) as partial:
        check_space(partial, sum(spec.nbytes for spec in _specs(entries, arrays)))
        write_config_files(partial, config, source_dir=source_dir, dtype=dtype)
        _write_base(partial, base, arrays, max_shard_bytes, progress)
        if adapter:
            _write_file(partial / ADAPTER, _specs(adapter, arrays), _tensors(adapter, arrays), progress)
            _name_base(partial / ADAPTER_CONFIG, path, keep=same_weights)


def _name_base(adapter_config: epath.Path, path: str | os.PathLike, *, keep: bool) -> None:
    """Let the adapter say that its base is `path`, as transformers does when it saves.

    transformers 4 loads the base from there, even if the directory has one: weights that were trained would be replaced
    by those they were trained from.
    """
    values = read_json(adapter_config)
    if not keep or "base_model_name_or_path" not in values:
        adapter_config.write_bytes(to_json({**values, "base_model_name_or_path": os.path.abspath(path)}))


def _write_base(
    out: epath.Path,
    entries: list[names.Entry],
    arrays: Mapping[str, Any],
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Write all tensors into one file, or into numbered files of limited size and an index."""
    shards = _shards(_specs(entries, arrays), max_shard_bytes)
    tensors = _tensors(entries, arrays)
    if len(shards) == 1:
        _write_file(out / SINGLE, shards[0], tensors, progress)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(out / file, shard, tensors, progress)
        weight_map.update({spec.name: file for spec in shard})
    total = sum(spec.nbytes for shard in shards for spec in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX).write_bytes(to_json(index))


def _shards(specs: list[Spec], max_shard_bytes: int) -> list[list[Spec]]:
    """Group tensors, in order, into files of at most `max_shard_bytes`; a larger tensor stands alone."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _write_file(
    path: epath.Path, specs: list[Spec], tensors: Iterator[np.ndarray], progress: Callable[[int], None]
) -> None:
    """Write a safetensors file of the next tensors: length of the header, header, data without gaps.

    Its bytes are those that the safetensors package writes. That one needs all tensors in memory, twice.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in sorted(specs, key=lambda spec: (DTYPE_ORDER.index(spec.dtype), spec.name)):
        begin, end = end, end + spec.nbytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin on a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            file.seek(8 + len(text) + header[spec.name]["data_offsets"][0])
            # Without a name: a view of one stack must not outlive it while the next one is read.
            write_pieces(file, contiguous(next(tensors)).reshape(-1).view(np.uint8))
            progress(spec.nbytes)


def _specs(entries: list[names.Entry], arrays: Mapping[str, Any]) -> list[Spec]:
    """Return what `_tensors` will yield, in its order."""
    specs = []
    for entry in entries:
        shape, dtype = tuple(arrays[entry.path].shape), np.dtype(arrays[entry.path].dtype)
        stored = entry.transform.stored_shape(shape[1:] if entry.stacked else shape)
        for layer in range(shape[0]) if entry.stacked else (None,):
            name = entry.name.format(l=layer)
            specs.append(Spec(name, stored, dtype))
            if name.endswith(names.RUNNING_VAR):
                specs.append(Spec(name.replace(names.RUNNING_VAR, names.COUNTER), (), np.dtype(np.int64)))
    return specs


def _tensors(entries: list[names.Entry], arrays: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yield the tensors of our arrays in the layout of Hugging Face files, one per layer where it is a stack."""
    for entry in entries:
        for value in layers(arrays[entry.path], stacked=entry.stacked):
            yield entry.transform.write(value)
            del value
            if entry.name.endswith(names.RUNNING_VAR):
                # Unused in inference, but transformers reports a BatchNorm without it as incomplete.
                yield np.zeros((), np.int64)
