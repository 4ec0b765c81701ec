"""Orbax model directories: `params/` (a flat dict of arrays), `model_port.json` and the small files of the source.

A directory may be partial: it then holds some of the parameters and names the base directory that has the rest.
"""

import os
from collections.abc import Mapping
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
from model_port.weights.side_files import read_config, read_json, to_json, write_side_files, written_aside

MANIFEST = "model_port.json"
PARAMS = "params"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What model_port.json says.

    Attributes:
        dtype: dtype of the stored arrays; "mixed" if they differ.
        base: directory that holds the parameters which are not here, or None.
        base_lora: what becomes of the base's own adapter: keep, merge (folded into its kernels) or none (dropped).
    """

    dtype: str
    base: str | None = None
    base_lora: str = "keep"


def write_orbax(
    path: str | os.PathLike,
    config: GraniteSpeechConfig,
    arrays: Mapping[str, Any],
    *,
    source_dir: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    base_lora: str = "keep",
) -> None:
    """Write {dotted path: array} as an Orbax model directory; every process of a run must call it.

    Args:
        source_dir: model directory whose config, tokenizer and processor files are copied.
        base: model directory that holds the parameters which are not in `arrays`. It is remembered relative to
            `path` if it lies beside it or below, so that the tree can be moved, and by its full path otherwise.

    Raises:
        UserError: `path` exists and is not empty.
    """
    path = _absolute(path)
    dtypes = {np.dtype(array.dtype).name for array in arrays.values()}
    manifest = {
        "format": FORMAT,
        "dtype": dtypes.pop() if len(dtypes) == 1 else "mixed",
        "base": None if base is None else _reference(_absolute(base), path),
        "base_lora": base_lora,
    }
    leader = jax.process_index() == 0
    with written_aside(path, leader=leader, barrier=multihost_utils.sync_global_devices) as partial:
        ocp.save(partial / PARAMS, dict(arrays))
        if leader:
            write_side_files(partial, config, source_dir=source_dir)
            (partial / MANIFEST).write_bytes(to_json(manifest))


def read_orbax(
    path: str | os.PathLike, shardings: Mapping[str, Sharding] | None = None
) -> tuple[GraniteSpeechConfig, dict[str, Any]]:
    """Read an Orbax model directory into its config and {dotted path: array}; of a partial one, what is there.

    Args:
        shardings: where each array goes; without it they are NumPy arrays.

    Raises:
        UserError: `params/` is absent or damaged.
    """
    path = _absolute(path)
    config = read_config(path)
    params = path / PARAMS
    if not params.exists():
        raise UserError(f"{path} has no {PARAMS}/; the checkpoint is incomplete, convert or save it again")
    try:
        stored = ocp.metadata(params).metadata
        if stored is None:
            raise ValueError("its metadata does not agree with its data")
        target = {name: _target(leaf, (shardings or {}).get(name)) for name, leaf in stored.items()}
        return config, ocp.load(params, target)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).split(" [tensorstore_spec")[0]
        raise UserError(f"cannot read {params}, it is damaged ({reason}); convert or save it again") from error


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Read model_port.json; the base comes back as a full path.

    Raises:
        UserError: another format version, or a base that does not exist.
    """
    path = _absolute(path)
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path / MANIFEST} has format {manifest.get('format')!r}; this version reads format {FORMAT}")
    base = manifest.get("base")
    if base is not None:
        resolved = _absolute(base if "://" in base else path / base)
        if not resolved.exists():
            raise UserError(
                f"{path} holds only the trained parameters; the rest is in its base {resolved}, which does not exist: "
                f'put the base back, or correct "base" in {path / MANIFEST}'
            )
        base = os.fspath(resolved)
    return Manifest(dtype=manifest["dtype"], base=base, base_lora=manifest.get("base_lora", "keep"))


def _target(leaf: Any, sharding: Sharding | None) -> Any:
    if sharding is not None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    # To Orbax a NumPy array stands for "give me one like this"; a broadcast scalar takes no memory.
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _absolute(path: str | os.PathLike) -> epath.Path:
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _reference(base: epath.Path, path: epath.Path) -> str:
    beside = base.is_relative_to(path.parent) and "://" not in os.fspath(path)
    return os.path.relpath(base, path) if beside else os.fspath(base)
