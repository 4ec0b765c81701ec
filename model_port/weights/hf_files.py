# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories, read: every header is checked first, every tensor is read when it is needed."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.weights import names, tree
from model_port.weights.config_files import ADAPTER_CONFIG, CONFIG, read_config, read_json
from model_port.weights.lazy import LazyArray, Scratch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
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
    offset: int

    def __str__(self) -> str:
        return f"{self.key} in {os.path.basename(self.file)}"

    def read(self, scratch: Scratch | None = None) -> np.ndarray:
        """Return the tensor, in scratch memory if given. It is read, not mapped: what is mapped counts as in use."""
        dtype = DTYPES[self.dtype]
        nbytes = math.prod(self.shape) * dtype.itemsize
        memory = np.empty(nbytes, np.uint8) if scratch is None else scratch.take(nbytes)
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset)
                done = 0
                while done < nbytes and (count := file.readinto(memory[done:])):
                    done += count
        except OSError as error:
            raise UserError(f"cannot read {self.file} ({error}); {REMEDY}") from error
        if done < nbytes:
            raise UserError(f"cannot read {self.file}: it ends within {self.key}; {REMEDY}")
        return memory.view(dtype).reshape(self.shape)


@dataclass(frozen=True)
class Survey:
    """What the headers of a Hugging Face directory say.

    Attributes:
        config: with `tie_word_embeddings` as the files have it.
        files: the files that hold the model, the adapter's not among them.
        found: every tensor of the model.
        problems: what does not fit config.json, by kind.
        broken: what is wrong with whole files: a message for each.
    """

    config: GraniteSpeechConfig
    files: list[str]
    found: dict[Slot, Stored]
    problems: dict[str, list[str]]
    broken: list[str]


def open_hf(path: str | os.PathLike, *, adapter: bool = True) -> tuple[GraniteSpeechConfig, dict[str, LazyArray]]:
    """Return the config of a Hugging Face directory and {dotted path: array to be read}: layers stacked, as stored.

    The headers of all files are checked; tensors are read when an array is loaded. Of a sharded model only the files
    that the index names count. `config.tie_word_embeddings` follows the files: a stored head is used, unless
    config.json ties it and it equals the embedding; without one the embedding is the head, if config.json ties at
    either of its places.

    Args:
        adapter: whether to read the LoRA adapter, too; without it the model is the base model.

    Raises:
        UserError: a file that is absent or damaged, or tensors and config.json that do not agree; all are named.
    """
    path = os.fspath(path)
    result = survey(path, adapter=adapter)
    if result.broken:
        raise UserError("\n".join(result.broken))
    tree.check(path, result.problems, REMEDY)
    return result.config, {
        name: _lazy(name, shape, [(name, layer) for layer in _layers(name, shape)], result.found)
        for name, shape in tree.shapes(result.config).items()
    }


def same_tensor(one: Stored, other: Stored) -> bool:
    """Whether two tensors are equal, bit for bit."""
    return same_header(one, other) and one.read().tobytes() == other.read().tobytes()


def same_header(one: Stored, other: Stored) -> bool:
    """Whether two tensors could be equal, by their headers."""
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def survey(
    path: str | os.PathLike, *, adapter: bool = True, same: Callable[[Stored, Stored], bool] = same_tensor
) -> Survey:
    """Read the headers of a Hugging Face directory and note everything that is wrong with it.

    Args:
        adapter: as in `open_hf`.
        same: how to tell whether two tensors that should be one are; `same_header` reads no weights.

    Raises:
        UserError: an unusable config.json or index.
    """
    path = os.fspath(path)
    config = read_config(path, adapter=adapter)
    problems: dict[str, list[str]] = {}
    broken: list[str] = []
    files = _weight_files(path, broken)
    found = scan(files, problems, broken)
    if adapter and _adapter_file(path, config, broken):
        _add_adapter(found, scan({os.path.join(path, ADAPTER): None}, problems, broken), problems, same)
    elif not adapter:
        found = {slot: stored for slot, stored in found.items() if not names.is_lora(slot[0])}
    config = _with_true_head(config, found, path, same)
    _compare(config, found, problems)
    return Survey(config=config, files=list(files), found=found, problems=problems, broken=broken)


def _weight_files(path: str, broken: list[str]) -> dict[str, set[str] | None]:
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
        broken.append(f"{index} names {', '.join(absent)}, not in {path}; download the directory again, complete")
    return {os.path.join(path, name): keys for name, keys in sorted(shards.items()) if name not in absent}


def _adapter_file(path: str, config: GraniteSpeechConfig, broken: list[str]) -> bool:
    """Whether there is an adapter file to read."""
    exists = os.path.exists(os.path.join(path, ADAPTER))
    if exists and config.lora is None:
        broken.append(f"{path} has {ADAPTER} but no {ADAPTER_CONFIG}, which says its rank and alpha; add that file")
    return exists


def scan(files: Mapping[str, set[str] | None], problems: dict[str, list[str]], broken: list[str]) -> dict[Slot, Stored]:
    """Find every tensor of `files` by reading their headers."""
    found: dict[Slot, Stored] = {}
    for file, promised in files.items():
        try:
            headers = list(_headers(file, promised, problems))
        except UserError as error:
            broken.append(str(error))
            continue
        for stored in headers:
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
    _check_whole(file)
    with open(file, "rb") as data:
        size = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(size))
    header.pop("__metadata__", None)
    for key in sorted((promised or set()) - header.keys()):
        problems.setdefault("promised by the index but absent", []).append(f"{key} in {os.path.basename(file)}")
    for key, entry in sorted(header.items()):
        yield Stored(file, key, tuple(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0])


def _check_whole(file: str) -> None:
    """Raise a UserError unless the safetensors package finds header and length of the file right."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}, it is truncated or no safetensors file ({error}); {REMEDY}") from error


def _add_adapter(
    found: dict[Slot, Stored],
    adapter: dict[Slot, Stored],
    problems: dict[str, list[str]],
    same: Callable[[Stored, Stored], bool],
) -> None:
    """Add the adapter file's tensors; a model saved together with its adapter may hold the same ones already."""
    for slot, stored in adapter.items():
        if slot in found and not same(stored, found[slot]):
            problems.setdefault("duplicate", []).append(f"{stored} and, different, {found[slot]}")
        found[slot] = stored


def _with_true_head(
    config: GraniteSpeechConfig, found: dict[Slot, Stored], path: str, same: Callable[[Stored, Stored], bool]
) -> GraniteSpeechConfig:
    """Set `tie_word_embeddings` by what is stored; a stored copy of a tied embedding is taken out of `found`.

    transformers up to 5.9 obeys text_config, later ones the top level, and files exist in which the two disagree.
    """
    head, embedding = found.get((names.LM_HEAD, None)), found.get((names.EMBEDDING, None))
    if head is None:
        text = read_json(epath.Path(path) / CONFIG)["text_config"]
        tied = config.tie_word_embeddings or bool(text.get("tie_word_embeddings"))
    else:
        tied = config.tie_word_embeddings and embedding is not None and same(head, embedding)
        if tied:
            del found[names.LM_HEAD, None]
    return dataclasses.replace(config, tie_word_embeddings=tied)


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
        stored_shape = entry.transform.stored_shape(shape[1:] if entry.stacked else shape)
        for layer in _layers(path, shape):
            yield (path, layer), (entry.name.format(l=layer), stored_shape)


def _layers(path: str, shape: tuple[int, ...]) -> Iterable[int | None]:
    """Return the layers of a stacked parameter; None stands for the one tensor of another."""
    return range(shape[0]) if names.BY_PATH[path].stacked else (None,)


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


def _lazy(path: str, shape: tuple[int, ...], slots: list[Slot], found: dict[Slot, Stored]) -> LazyArray:
    """Return the parameter `path` over its tensors; layers of different dtypes are all widened to float32."""
    stored = [found[slot] for slot in slots]
    dtypes = {DTYPES[tensor.dtype] for tensor in stored}
    read = names.BY_PATH[path].transform.read
    return LazyArray(
        name=path,
        shape=shape,
        dtype=dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32),
        stacked=names.BY_PATH[path].stacked,
        layers=lambda: (lambda scratch, tensor=tensor: read(tensor.read(scratch)) for tensor in stored),
    )
