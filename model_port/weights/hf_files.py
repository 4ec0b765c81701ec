"""Hugging Face directories: safetensors read and written tensor by tensor."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.weights import names, tree
from model_port.weights.side_files import (
    ADAPTER_CONFIG,
    CONFIG,
    read_config,
    read_json,
    to_json,
    write_side_files,
    written_aside,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
REMEDY = "download or save the directory again, complete, or correct its config.json"

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

Slot = tuple[str, int | None]  # one of our parameters, and the layer in its stack


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, known from the file's header alone."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.key} in {os.path.basename(self.file)}"


def read_hf(path: str | os.PathLike, *, adapter: bool = True) -> tuple[GraniteSpeechConfig, dict[str, np.ndarray]]:
    """Read a Hugging Face directory into its config and {dotted path: array}, layers stacked, dtypes as stored.

    The headers of all files are checked before the first tensor is read. Of a sharded model only the files that the
    index names count. `config.tie_word_embeddings` follows the files: a stored head is used, unless config.json ties
    it and it equals the embedding; without one the embedding is the head, if config.json ties at either of its places.

    Args:
        adapter: whether to read the LoRA adapter, too; without it the model is the base model.

    Raises:
        UserError: a file that is absent or damaged, or tensors and config.json that do not agree; all are named.
    """
    path = os.fspath(path)
    config = read_config(path, adapter=adapter)
    problems: dict[str, list[str]] = {}
    found = _scan(_weight_files(path), problems)
    if adapter and _adapter_file(path, config):
        _add_adapter(found, _scan({os.path.join(path, ADAPTER): None}, problems), problems)
    elif not adapter:
        found = {slot: stored for slot, stored in found.items() if not names.is_lora(slot[0])}
    config = _with_true_head(config, found, path)
    _compare(config, found, problems)
    tree.check(path, problems, REMEDY)
    return config, _read(found, config)


def write_hf(
    path: str | os.PathLike,
    config: GraniteSpeechConfig,
    arrays: Mapping[str, Any],
    *,
    source_dir: str | os.PathLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write {dotted path: array} as a Hugging Face directory in the published layout, dtypes as given.

    Args:
        source_dir: model directory whose config, tokenizer and processor files are copied.
        max_shard_bytes: above this size the model is split into several files with an index.

    Raises:
        UserError: `path` exists and is not empty.
    """
    entries = [entry for entry in names.TABLE if entry.path in arrays]
    base = [entry for entry in entries if not names.is_lora(entry.path)]
    adapter = [entry for entry in entries if names.is_lora(entry.path)]
    dtype = np.dtype(arrays[names.EMBEDDING].dtype).name
    with written_aside(path) as partial:
        write_side_files(partial, config, source_dir=source_dir, dtype=dtype)
        _write_base(os.fspath(partial), base, arrays, max_shard_bytes)
        if adapter:
            tensors = {name: tensor for entry in adapter for name, tensor in _tensors(entry, arrays[entry.path])}
            save_file(tensors, partial / ADAPTER, metadata={"format": "pt"})


def _weight_files(path: str) -> dict[str, set[str] | None]:
    """Return the files that hold the model, each with the keys its index promises (None without an index)."""
    index = os.path.join(path, INDEX)
    if not os.path.exists(index):
        if os.path.exists(os.path.join(path, SINGLE)):
            return {os.path.join(path, SINGLE): None}
        raise UserError(f"{path} has neither {SINGLE} nor {INDEX}; only safetensors weights can be read")
    with open(index, encoding="utf-8") as file:
        try:
            weight_map = json.load(file)["weight_map"]
            shards = {name: {key for key in weight_map if weight_map[key] == name} for name in set(weight_map.values())}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index with a weight_map ({error!r}); {REMEDY}") from error
    absent = sorted(name for name in shards if not os.path.exists(os.path.join(path, name)))
    if absent:
        raise UserError(f"{index} names {', '.join(absent)}, not in {path}; download the directory again, complete")
    return {os.path.join(path, name): keys for name, keys in sorted(shards.items())}


def _adapter_file(path: str, config: GraniteSpeechConfig) -> bool:
    """Whether there is an adapter file to read."""
    exists = os.path.exists(os.path.join(path, ADAPTER))
    if exists and config.lora is None:
        raise UserError(f"{path} has {ADAPTER} but no {ADAPTER_CONFIG}, which says its rank and alpha; add that file")
    return exists


def _scan(files: Mapping[str, set[str] | None], problems: dict[str, list[str]]) -> dict[Slot, Stored]:
    """Find every tensor of `files` by reading their headers."""
    found: dict[Slot, Stored] = {}
    for file, promised in files.items():
        for stored in _headers(file, promised, problems):
            name = names.normalise(stored.key)
            if name is None:
                continue
            row = names.lookup(name)
            if row is None:
                problems.setdefault("unexpected", []).append(str(stored))
                continue
            slot = row[0].path, row[1]
            if slot in found:
                problems.setdefault("duplicate", []).append(f"{stored} and {found[slot]}")
            found[slot] = stored
    return found


def _headers(file: str, promised: set[str] | None, problems: dict[str, list[str]]) -> Iterator[Stored]:
    with _open(file) as tensors:
        keys = set(tensors.keys())
        for key in sorted((promised or set()) - keys):
            problems.setdefault("promised by the index but absent", []).append(f"{key} in {os.path.basename(file)}")
        for key in sorted(keys):
            header = tensors.get_slice(key)
            yield Stored(file, key, tuple(header.get_shape()), header.get_dtype())


def _open(file: str):
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}, it is truncated or no safetensors file ({error}); {REMEDY}") from error


def _add_adapter(found: dict[Slot, Stored], adapter: dict[Slot, Stored], problems: dict[str, list[str]]) -> None:
    """Add the adapter file's tensors; a model saved together with its adapter may hold the same ones already."""
    for slot, stored in adapter.items():
        if slot in found and not _same(stored, found[slot]):
            problems.setdefault("duplicate", []).append(f"{stored} and, different, {found[slot]}")
        found[slot] = stored


def _with_true_head(config: GraniteSpeechConfig, found: dict[Slot, Stored], path: str) -> GraniteSpeechConfig:
    """Set `tie_word_embeddings` by what is stored; a stored copy of a tied embedding is taken out of `found`.

    transformers up to 5.9 obeys text_config, later ones the top level, and files exist in which the two disagree.
    """
    head, embedding = found.get((names.LM_HEAD, None)), found.get((names.EMBEDDING, None))
    if head is None:
        text = read_json(epath.Path(path) / CONFIG)["text_config"]
        tied = config.tie_word_embeddings or bool(text.get("tie_word_embeddings"))
    else:
        tied = config.tie_word_embeddings and embedding is not None and _same(head, embedding)
        if tied:
            del found[names.LM_HEAD, None]
    return dataclasses.replace(config, tie_word_embeddings=tied)


def _same(one: Stored, other: Stored) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with _open(one.file) as first, _open(other.file) as second:
        return first.get_tensor(one.key).tobytes() == second.get_tensor(other.key).tobytes()


def _compare(config: GraniteSpeechConfig, found: dict[Slot, Stored], problems: dict[str, list[str]]) -> None:
    """Note every tensor that config.json asks for and is not there as asked, or is there and not asked for."""
    wanted = dict(_wanted(config))
    for slot, (name, shape) in wanted.items():
        stored = found.get(slot)
        if stored is None:
            problems.setdefault("missing", []).append(f"{name} {shape}")
        elif stored.shape != shape:
            problems.setdefault("wrong shape", []).append(f"{stored} is {stored.shape}, config.json asks for {shape}")
        elif stored.dtype not in DTYPES:
            problems.setdefault("unsupported dtype", []).append(
                f"{stored} is {stored.dtype}, not {' or '.join(DTYPES)}"
            )
    for slot, stored in found.items():
        if slot not in wanted:
            problems.setdefault("unexpected", []).append(f"{stored}{_why_unexpected(slot, config)}")


def _wanted(config: GraniteSpeechConfig) -> Iterator[tuple[Slot, tuple[str, tuple[int, ...]]]]:
    """Yield each slot of the model with its name and shape in a file."""
    for path, shape in tree.shapes(config).items():
        entry = names.BY_PATH[path]
        if not entry.stacked:
            yield (path, None), (entry.name, entry.transform.stored_shape(shape))
            continue
        stored_shape = entry.transform.stored_shape(shape[1:])
        for layer in range(shape[0]):
            yield (path, layer), (entry.name.format(l=layer), stored_shape)


def _why_unexpected(slot: Slot, config: GraniteSpeechConfig) -> str:
    path, layer = slot
    if names.is_lora(path):
        targets = f"has target_modules {config.lora.target_modules}" if config.lora else "is absent"
        return f" ({ADAPTER_CONFIG} {targets})"
    if path == names.LM_HEAD:
        return " (tie_word_embeddings)"
    layers = {
        "encoder": config.encoder.num_layers,
        "projector": config.projector.num_hidden_layers,
        "decoder": config.decoder.num_hidden_layers,
    }[path.split(".")[0]]
    return f" (config.json has {layers} layers in the {path.split('.')[0]})"


def _read(found: dict[Slot, Stored], config: GraniteSpeechConfig) -> dict[str, np.ndarray]:
    """Read every tensor into its place in arrays of the whole model; a stack takes the one dtype of its layers.

    Layers of different dtypes are all widened to float32, which holds each value exactly.
    """
    dtypes: dict[str, set[np.dtype]] = {}
    for (path, _), stored in found.items():
        dtypes.setdefault(path, set()).add(DTYPES[stored.dtype])
    arrays = {
        path: np.empty(shape, dtypes[path].pop() if len(dtypes[path]) == 1 else np.float32)
        for path, shape in tree.shapes(config).items()
    }
    for file in sorted({stored.file for stored in found.values()}):
        with _open(file) as tensors:
            for (path, layer), stored in found.items():
                if stored.file == file:
                    value = names.BY_PATH[path].transform.read(tensors.get_tensor(stored.key))
                    arrays[path][... if layer is None else layer] = value
    return arrays


def _write_base(out: str, entries: list[names.Entry], arrays: Mapping[str, Any], max_shard_bytes: int) -> None:
    """Write all tensors into one file, or into numbered files of limited size and an index."""
    written: list[list[str]] = []
    total_size = 0
    for shard in _shards(entries, arrays, max_shard_bytes):
        save_file(shard, os.path.join(out, _temporary(len(written))), metadata={"format": "pt"})
        written.append(list(shard))
        total_size += sum(tensor.nbytes for tensor in shard.values())
    if len(written) == 1:
        os.rename(os.path.join(out, _temporary(0)), os.path.join(out, SINGLE))
        return
    weight_map = {}
    for number, keys in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        os.rename(os.path.join(out, _temporary(number)), os.path.join(out, file))
        weight_map.update(dict.fromkeys(keys, file))
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    with open(os.path.join(out, INDEX), "wb") as file:
        file.write(to_json(index))


def _temporary(number: int) -> str:
    # A file's name says how many there are, which is known only after the last one.
    return f"model-{number}.tmp"


def _shards(
    entries: list[names.Entry], arrays: Mapping[str, Any], max_shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Group tensors, in order, into dicts of at most `max_shard_bytes`; a larger tensor stands alone."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for entry in entries:
        for name, tensor in _tensors(entry, arrays[entry.path]):
            if shard and size + tensor.nbytes > max_shard_bytes:
                yield shard
                shard, size = {}, 0
            shard[name] = tensor
            size += tensor.nbytes
    yield shard


def _tensors(entry: names.Entry, array: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of one of our arrays under their Hugging Face names, one per layer where it is a stack."""
    array = np.asarray(array)
    layers = [(entry.name, array)]
    if entry.stacked:
        layers = [(entry.name.format(l=layer), array[layer]) for layer in range(array.shape[0])]
    for name, value in layers:
        yield name, np.ascontiguousarray(entry.transform.write(value))
        if name.endswith(".running_var"):
            # Unused in inference, but transformers reports a BatchNorm without it as incomplete.
            yield name.replace("running_var", "num_batches_tracked"), np.zeros((), np.int64)
