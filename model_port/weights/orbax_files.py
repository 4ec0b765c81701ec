# SPDX-License-Identifier: Apache-2.0
"""Orbax model directories: `params/` (a flat dict of arrays), `model_port.json` and the small files of the source.

A directory may be partial: it then holds some of the parameters and names the base directory that has the rest.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.libraries import quiet
from model_port.paths import absolute, is_remote
from model_port.weights import chunk_files, names
from model_port.weights.config_files import read_config, read_json, to_json, write_config_files
from model_port.weights.lazy import LazyArray
from model_port.weights.writing import check_space, written_aside

MANIFEST = "model_port.json"
PARAMS = "params"
STATE = "state"  # in it, as Orbax calls a tree that was saved without a name for it
FORMAT = 1

# Arrays are written together up to this size: one by one, a thousand small ones would take long.
GROUP_BYTES = 2**29
# Arrays up to this size are read all at once, when the first is: Orbax takes long to begin.
SMALL_BYTES = 2**22


@dataclass(frozen=True)
class Manifest:
    """What model_port.json says.

    Attributes:
        dtype: dtype of the stored arrays; "mixed" if they differ.
        base: directory that holds the parameters which are not here, or None.
        base_lora: what becomes of the base's own adapter: keep, merge (folded into its kernels) or none (dropped).
        converted: whether the weights are those of the Hugging Face directory that the small files come from.
    """

    dtype: str
    base: str | None = None
    base_lora: str = "keep"
    converted: bool = False


def write_orbax(
    path: str | os.PathLike,
    config: GraniteSpeechConfig,
    arrays: Mapping[str, Any],
    *,
    source_dir: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    base_lora: str = "keep",
    converted: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write {dotted path: array, read or not} as an Orbax model directory; every process of a run must call it.

    Args:
        source_dir: model directory whose config, tokenizer and processor files are copied.
        base: model directory that holds the parameters which are not in `arrays`. It is remembered relative to
            `path` if it lies beside it or below, so that the tree can be moved, and by its full path otherwise.
        converted: whether the weights are those of `source_dir`.
        progress: told the bytes of every group of arrays that is written.

    Raises:
        UserError: `path` exists and is not empty, or it does not fit on its disk.
    """
    path = absolute(path)
    dtypes = {np.dtype(array.dtype).name for array in arrays.values()}
    manifest = {
        "format": FORMAT,
        "dtype": dtypes.pop() if len(dtypes) == 1 else "mixed",
        "base": None if base is None else _reference(absolute(base), path),
        "base_lora": base_lora,
        "converted": converted,
    }
    leader = jax.process_index() == 0
    with written_aside(path, leader=leader, barrier=multihost_utils.sync_global_devices) as partial:
        check_space(partial, sum(array.nbytes for array in arrays.values()))
        _write_params(partial / PARAMS, arrays, progress)
        if leader:
            write_config_files(partial, config, source_dir=source_dir)
            (partial / MANIFEST).write_bytes(to_json(manifest))


def _write_params(path: epath.Path, arrays: Mapping[str, Any], progress: Callable[[int], None]) -> None:
    """Write what is in memory by Orbax, group by group, then what is still to be read into the places it made."""
    lazy = {name: array for name, array in arrays.items() if isinstance(array, LazyArray)}
    stored = {name: chunk_files.placeholder(array) if name in lazy else array for name, array in arrays.items()}
    # Orbax warns that there is nothing to merge, which is as it should be without OCDBT.
    with _storage(), quiet("absl"):
        if is_remote(path):  # where Orbax cannot save in parts
            ocp.save(path, stored)
            progress(sum(stored[name].nbytes for name in stored if name not in lazy))
        else:
            for group in _groups(stored):
                ocp.partial.save(path, {name: stored[name] for name in group})
                progress(sum(stored[name].nbytes for name in group if name not in lazy))
            ocp.partial.finalize(path)
    if jax.process_index() == 0:
        chunk_files.write_arrays(path / STATE, lazy, progress)


def _storage() -> ocp.Context:
    """Return how arrays are stored.

    Weights are noise to a compressor. In files of their own, chunks go from our memory to the disk, while OCDBT would
    gather gigabytes of them first. They are cut along the largest dimensions, so that a host reads little beyond its
    own shards. Nothing changes an array while it is written, so it need not be copied.
    """
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=chunk_files.CHUNK_BYTES)
    context.memory.deepcopy_host_arrays = False
    return context


def _groups(arrays: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the names in groups of at most GROUP_BYTES; a larger array stands alone."""
    group: list[str] = []
    size = 0
    for name, array in arrays.items():
        if group and size + array.nbytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += array.nbytes
    yield group


def open_orbax(path: str | os.PathLike) -> tuple[GraniteSpeechConfig, dict[str, LazyArray]]:
    """Return the config of an Orbax model directory and {dotted path: array to be read}; of a partial one, its part.

    Raises:
        UserError: `params/` is absent or damaged; also when an array is loaded.
    """
    config, params, stored = _metadata(path)
    sizes = {name: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for name, leaf in stored.items()}
    together = {name: leaf for name, leaf in stored.items() if sizes[name] <= SMALL_BYTES}
    small = functools.cache(lambda: _read(params, together))

    def read(name: str) -> np.ndarray:
        return small()[name] if name in together else _read(params, {name: stored[name]})[name]

    return config, {name: _lazy(name, leaf, read) for name, leaf in stored.items()}


def read_orbax(
    path: str | os.PathLike, shardings: Mapping[str, Sharding] | None = None
) -> tuple[GraniteSpeechConfig, dict[str, Any]]:
    """Read an Orbax model directory at once: its config and {dotted path: array}; of a partial one, its part.

    Args:
        shardings: where each array goes, and of which each process reads its shards; without it they are NumPy arrays.

    Raises:
        UserError: `params/` is absent or damaged.
    """
    config, params, stored = _metadata(path)
    with _explained(params):
        return config, ocp.load(
            params, {name: _like(leaf, (shardings or {}).get(name)) for name, leaf in stored.items()}
        )


def _metadata(path: str | os.PathLike) -> tuple[GraniteSpeechConfig, epath.Path, dict[str, Any]]:
    """Return the config, the directory of the arrays, and shape and dtype of each."""
    path = absolute(path)
    config = read_config(path)
    params = path / PARAMS
    if not params.exists():
        raise UserError(f"{path} has no {PARAMS}/; the checkpoint is incomplete, convert or save it again")
    with _explained(params):
        stored = ocp.metadata(params).metadata
        if stored is None:
            raise ValueError("its metadata does not agree with its data")
    return config, params, stored


def _lazy(name: str, leaf: Any, read: Callable[[str], np.ndarray]) -> LazyArray:
    stacked = names.BY_PATH[name].stacked if name in names.BY_PATH else False
    return LazyArray(
        name=name,
        shape=tuple(leaf.shape),
        dtype=np.dtype(leaf.dtype),
        stacked=stacked,
        layers=lambda: (lambda scratch, layer=layer: layer for layer in (read(name) if stacked else (read(name),))),
    )


def _read(params: epath.Path, leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """Read some of the arrays."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _explained(params), context:
        return ocp.load(params, {name: _like(leaf) for name, leaf in leaves.items()})


@contextlib.contextmanager
def _explained(params: epath.Path) -> Iterator[None]:
    """Turn what Orbax says of damaged files into a UserError."""
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).split(" [tensorstore_spec")[0]
        raise UserError(f"cannot read {params}, it is damaged ({reason}); convert or save it again") from error


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Read model_port.json; the base comes back as a full path.

    Raises:
        UserError: another format version, or a base that does not exist.
    """
    path = absolute(path)
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path / MANIFEST} has format {manifest.get('format')!r}; this version reads format {FORMAT}")
    base = manifest.get("base")
    if base is not None:
        resolved = absolute(base if is_remote(base) or os.path.isabs(base) else path / base)
        if not resolved.exists():
            raise UserError(
                f"{path} holds only the trained parameters; the rest is in its base {resolved}, which does not exist: "
                f'put the base back, or correct "base" in {path / MANIFEST}'
            )
        base = os.fspath(resolved)
    kept = {name: manifest[name] for name in ("base_lora", "converted") if name in manifest}
    return Manifest(dtype=manifest["dtype"], base=base, **kept)


def _like(leaf: Any, sharding: Sharding | None = None) -> Any:
    """Return what asks Orbax for an array: a shape with a sharding, or a NumPy array, which takes no memory here."""
    if sharding is not None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _reference(base: epath.Path, path: epath.Path) -> str:
    beside = base.is_relative_to(path.parent) and not is_remote(path)
    return os.path.relpath(base, path) if beside else os.fspath(base)
