# SPDX-License-Identifier: Apache-2.0
"""From a directory of either kind to a model, and back."""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.model import GraniteSpeech
from model_port.partition import param_shardings, vocab_multiple
from model_port.weights import hf_files, hf_writer, names, orbax_files, tree
from model_port.weights.config_files import CONFIG, read_config
from model_port.weights.lazy import Layer, LazyArray, cast, layers, load

DTYPES = ("float32", "bfloat16", "float16")
LORA = ("keep", "merge", "none")

# Of all the bytes to come, a context that takes the bytes of each piece as it is done.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


def silent(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress that nobody sees."""
    return nullcontext(lambda size: None)


def load_model(
    path: str | os.PathLike, *, dtype: str = "float32", lora: str = "keep", mesh: Mesh | None = None
) -> GraniteSpeech:
    """Load a model from a Hugging Face directory or an Orbax model directory.

    Args:
        dtype: of all parameters and BatchNorm statistics, and of the computation: float32, bfloat16 or float16.
        lora: `keep` the adapter apart, `merge` it into the kernels (in float32, before the cast), or `none`: the
            base model without it.
        mesh: if given, every array is placed on it as `partition.param_shardings` says, the vocabulary padded to a
            multiple of what divides it.

    Raises:
        UserError: neither kind of directory, or one that is damaged or incomplete.
    """
    _check_choices(dtype, lora)
    shardings = None
    if mesh is not None and lora != "merge" and directory_kind(path) == "orbax":
        # Known before reading, so that no process reads more than its own shards.
        config = read_config(path, adapter=lora == "keep")
        padded = tree.shapes(config.padded(vocab_multiple(mesh)))
        whole = {name for name, shape in tree.shapes(config).items() if shape != padded[name]}
        found = _shardings(config.padded(vocab_multiple(mesh)), mesh)
        shardings = {name: sharding for name, sharding in found.items() if name not in whole}
    config, arrays = open_model(path, lora=lora, dtype=dtype, shardings=shardings)
    return build_model(config, arrays, dtype=dtype, mesh=mesh)


def build_model(
    config: GraniteSpeechConfig, arrays: dict[str, Any], *, dtype: str = "float32", mesh: Mesh | None = None
) -> GraniteSpeech:
    """Make a model of {dotted path: array}, which is emptied on the way so that no array is held twice."""
    config = config if mesh is None else config.padded(vocab_multiple(mesh))
    model = tree.abstract_model(config, jnp.dtype(dtype))
    shardings, shapes = {} if mesh is None else _shardings(config, mesh), tree.shapes(config)
    tree.fill(model, lambda path: _place(_pad(load(arrays.pop(path)), shapes[path]), shardings.get(path)))
    return model


def open_model(
    path: str | os.PathLike,
    *,
    lora: str = "keep",
    dtype: str | None = None,
    shardings: Mapping[str, Sharding] | None = None,
) -> tuple[GraniteSpeechConfig, dict[str, Any]]:
    """Open a directory of either kind: its config and {dotted path: array to be read}, a partial one with its base.

    Args:
        lora: as in `load_model`.
        dtype: to cast to; by default each array keeps its own.
        shardings: if given, what Orbax holds is read at once, straight into these.
    """
    if directory_kind(path) == "hf":
        config, arrays = hf_files.open_hf(path, adapter=lora != "none")
    else:
        config, arrays = _read_orbax_with_base(path, shardings)
        if lora == "none":
            config = dataclasses.replace(config, lora=None)
            arrays = {name: array for name, array in arrays.items() if not names.is_lora(name)}
        _check_complete(path, config, arrays)
    if lora == "merge":
        config, arrays = merge(config, arrays)
    if dtype is not None:
        arrays = {name: _cast(array, dtype, name) for name, array in arrays.items()}
    return config, arrays


def merge(config: GraniteSpeechConfig, arrays: Mapping[str, Any]) -> tuple[GraniteSpeechConfig, dict[str, Any]]:
    """Fold the adapter into the kernels it sits on: kernel + (alpha / r) A B, in float32, layer by layer.

    The folded kernels are arrays to be read. They keep their dtype; cast them with `astype`, which rounds once only.
    """
    if config.lora is None:
        return config, dict(arrays)
    merged = {name: array for name, array in arrays.items() if not names.is_lora(name)}
    for module in (name.removesuffix(".lora.a") for name in arrays if name.endswith(".lora.a")):
        merged[f"{module}.kernel"] = _folded(
            f"{module}.kernel",
            *(arrays[f"{module}.{leaf}"] for leaf in ("kernel", "lora.a", "lora.b")),
            config.lora.scaling,
        )
    return dataclasses.replace(config, lora=None), merged


def _folded(name: str, kernel: Any, a: Any, b: Any, scaling: float) -> LazyArray:
    def folded() -> Iterator[Layer]:
        for parts in zip(*(layers(array, stacked=True) for array in (kernel, a, b)), strict=True):
            frozen, down, up = (part.astype(np.float32) for part in parts)
            yield lambda scratch, frozen=frozen, down=down, up=up: frozen + np.float32(scaling) * (down @ up)

    return LazyArray(name=name, shape=tuple(kernel.shape), dtype=np.dtype(kernel.dtype), stacked=True, layers=folded)


def model_arrays(model: GraniteSpeech) -> dict[str, jax.Array]:
    """Return a model's parameters and BatchNorm statistics by dotted path."""
    return {path: variable.get_value() for path, variable in tree.variables(model).items()}


def save_model(
    model: GraniteSpeech,
    path: str | os.PathLike,
    *,
    source_dir: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    base_lora: str = "keep",
    only: Collection[str] | None = None,
) -> None:
    """Write a model as an Orbax model directory; every process of a run must call it.

    Args:
        source_dir: model directory whose tokenizer and processor files, and config where it still holds, are copied.
        base: model directory, of either kind, that holds the parameters left out.
        base_lora: with which `lora` setting the base was loaded.
        only: the dotted paths to store, e.g. of the trained parameters; the others are left to `base`.
    """
    config = model.config.padded(1)
    shapes = tree.shapes(config)
    arrays = {name: _cut(array, shapes[name]) for name, array in model_arrays(model).items()}
    if only is not None:
        unknown = sorted(set(only) - set(arrays))
        if unknown or base is None:
            raise UserError(f"cannot store a part of the model: {f'no parameters {unknown}' if unknown else 'no base'}")
        arrays = {name: array for name, array in arrays.items() if name in set(only)}
    orbax_files.write_orbax(path, config, arrays, source_dir=source_dir, base=base, base_lora=base_lora)


def convert(
    src: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    lora: str = "keep",
    progress: Progress = silent,
) -> GraniteSpeechConfig:
    """Convert a Hugging Face directory to a complete Orbax one; `dtype` None keeps the source's. Return the config.

    Memory: the largest stacked parameter, and about 1 GB.
    """
    _check_choices(dtype, lora)
    config, arrays = open_model(src, lora=lora, dtype=dtype)
    with progress(sum(array.nbytes for array in arrays.values())) as written:
        orbax_files.write_orbax(out, config, arrays, source_dir=src, converted=True, progress=written)
    return config


def export(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    lora: str = "keep",
    max_shard_bytes: int = hf_writer.MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> GraniteSpeechConfig:
    """Write an Orbax model directory, a partial one with its base, as a Hugging Face directory. Return the config.

    Memory: the largest stacked parameter, and about 1 GB.
    """
    _check_choices(dtype, lora)
    config, arrays = open_model(checkpoint, lora=lora, dtype=dtype)
    same_weights = directory_kind(checkpoint) == "hf" or orbax_files.read_manifest(checkpoint).converted
    with progress(sum(array.nbytes for array in arrays.values())) as written:
        hf_writer.write_hf(
            out,
            config,
            arrays,
            source_dir=checkpoint,
            max_shard_bytes=max_shard_bytes,
            same_weights=same_weights,
            progress=written,
        )
    return config


def directory_kind(path: str | os.PathLike) -> str:
    """Tell "hf" and "orbax" model directories apart by the files in them; a UserError lists what else was found."""
    directory = epath.Path(path)
    if not directory.is_dir():
        raise UserError(f"{path} is not a directory; give a downloaded Hugging Face model or an Orbax model directory")
    found = sorted(file.name for file in directory.iterdir())
    if CONFIG in found and orbax_files.MANIFEST in found:
        return "orbax"
    if CONFIG in found and (hf_files.SINGLE in found or hf_files.INDEX in found):
        return "hf"
    raise UserError(
        f"{path} is no model directory: it needs {CONFIG} and either {hf_files.SINGLE} or {hf_files.INDEX} "
        f"(Hugging Face) or {orbax_files.MANIFEST} and {orbax_files.PARAMS}/ (Orbax); "
        f"it has {', '.join(found) or 'nothing'}"
    )


def _read_orbax_with_base(
    path: str | os.PathLike, shardings: Mapping[str, Sharding] | None
) -> tuple[GraniteSpeechConfig, dict[str, Any]]:
    manifest = orbax_files.read_manifest(path)
    config, arrays = orbax_files.read_orbax(path, shardings) if shardings else orbax_files.open_orbax(path)
    if manifest.base is not None:
        folded = manifest.base_lora == "merge"
        _, rest = open_model(manifest.base, lora=manifest.base_lora, shardings=None if folded else shardings)
        arrays = {**rest, **arrays}
    return config, arrays


def _check_complete(path: str | os.PathLike, config: GraniteSpeechConfig, arrays: Mapping[str, Any]) -> None:
    tree.check(os.fspath(path), tree.compare(config, arrays), "convert or save it again, or correct its config.json")


def _check_choices(dtype: str | None, lora: str) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if lora not in LORA:
        raise UserError(f"lora {lora!r} is not one of {', '.join(LORA)}")


def _shardings(config: GraniteSpeechConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    return param_shardings(nnx.state(tree.abstract_model(config)), mesh)


def _cast(array: Any, dtype: str, name: str) -> Any:
    if isinstance(array, LazyArray):
        return array.astype(dtype)
    if array.dtype == dtype:
        return array
    if dtype == "float16":
        cast(np.asarray(array), dtype, name)
    return array.astype(dtype)


def _pad(array: Any, shape: tuple[int, ...]) -> Any:
    """Return an array with zeros after it, up to a shape."""
    if array.shape == shape:
        return array
    return np.pad(np.asarray(array), [(0, size - there) for there, size in zip(array.shape, shape, strict=True)])


def _cut(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_pad`; an axis that was cut is whole on every device."""
    if array.shape == shape or not isinstance(array, jax.Array):
        return array
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        axes = [*sharding.spec, *(None,) * (array.ndim - len(sharding.spec))]
        kept = [axis if old == new else None for axis, old, new in zip(axes, array.shape, shape, strict=True)]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*kept))
    return jax.jit(lambda x: x[tuple(map(slice, shape))], out_shardings=sharding)(array)


def _place(array: Any, sharding: Sharding | None) -> jax.Array:
    if isinstance(array, jax.Array) and (sharding is None or array.sharding == sharding):
        return array
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))
