"""From a directory of either kind to a model, and back."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.model import GraniteSpeech
from model_port.partition import param_shardings
from model_port.weights import hf_files, names, orbax_files, tree
from model_port.weights.side_files import CONFIG, read_config

DTYPES = ("float32", "bfloat16", "float16")
LORA = ("keep", "merge", "none")


def load_model(
    path: str | os.PathLike, *, dtype: str = "float32", lora: str = "keep", mesh: Mesh | None = None
) -> GraniteSpeech:
    """Load a model from a Hugging Face directory or an Orbax model directory.

    Args:
        dtype: of all parameters and BatchNorm statistics, and of the computation: float32, bfloat16 or float16.
        lora: `keep` the adapter apart, `merge` it into the kernels (in float32, before the cast), or `none`: the
            base model without it.
        mesh: if given, every array is placed on it as `partition.param_shardings` says.

    Raises:
        UserError: neither kind of directory, or one that is damaged or incomplete.
    """
    _check_choices(dtype, lora)
    shardings = None
    if mesh is not None and lora != "merge" and directory_kind(path) == "orbax":
        # Known before reading, so that no process reads more than its own shards.
        shardings = _shardings(read_config(path, adapter=lora == "keep"), mesh)
    config, arrays = read_model(path, lora=lora, dtype=dtype, shardings=shardings)
    return build_model(config, arrays, dtype=dtype, mesh=mesh)


def build_model(
    config: GraniteSpeechConfig, arrays: dict[str, Any], *, dtype: str = "float32", mesh: Mesh | None = None
) -> GraniteSpeech:
    """Make a model of {dotted path: array}, which is emptied on the way so that no array is held twice."""
    model = tree.abstract_model(config, jnp.dtype(dtype))
    shardings = {} if mesh is None else _shardings(config, mesh)
    tree.fill(model, lambda path: _place(arrays.pop(path), shardings.get(path)))
    return model


def read_model(
    path: str | os.PathLike,
    *,
    lora: str = "keep",
    dtype: str | None = None,
    shardings: Mapping[str, Sharding] | None = None,
) -> tuple[GraniteSpeechConfig, dict[str, Any]]:
    """Read a directory of either kind into its config and {dotted path: array}, a partial one with its base.

    Args:
        lora: as in `load_model`.
        dtype: to cast to; by default each array keeps its own.
        shardings: where Orbax puts the arrays it reads; by default they are NumPy arrays.
    """
    if directory_kind(path) == "hf":
        config, arrays = hf_files.read_hf(path, adapter=lora != "none")
    else:
        config, arrays = _read_orbax_with_base(path, shardings)
        if lora == "none":
            config = dataclasses.replace(config, lora=None)
            arrays = {name: array for name, array in arrays.items() if not names.is_lora(name)}
        _check_complete(path, config, arrays)
    if lora == "merge":
        config, arrays = merge(config, arrays, dtype=dtype)
    if dtype is not None:
        for name in arrays:
            arrays[name] = _cast(arrays[name], dtype, name)
    return config, arrays


def merge(
    config: GraniteSpeechConfig, arrays: Mapping[str, Any], *, dtype: str | None = None
) -> tuple[GraniteSpeechConfig, dict[str, Any]]:
    """Fold the adapter into the kernels it sits on: kernel + (alpha / r) A B, in float32, layer by layer.

    Args:
        dtype: of the folded kernels; by default the dtype they had. Casting here rounds once only.
    """
    if config.lora is None:
        return config, dict(arrays)
    merged = {name: array for name, array in arrays.items() if not names.is_lora(name)}
    for module in (name.removesuffix(".lora.a") for name in arrays if name.endswith(".lora.a")):
        kernel, a, b = (np.asarray(arrays[f"{module}.{leaf}"]) for leaf in ("kernel", "lora.a", "lora.b"))
        folded = np.empty(kernel.shape, dtype or kernel.dtype)
        for layer in range(kernel.shape[0]):
            product = a[layer].astype(np.float32) @ b[layer].astype(np.float32)
            summed = kernel[layer].astype(np.float32) + np.float32(config.lora.scaling) * product
            folded[layer] = _cast(summed, folded.dtype.name, f"{module}.kernel")
        merged[f"{module}.kernel"] = folded
    return dataclasses.replace(config, lora=None), merged


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
    arrays = model_arrays(model)
    if only is not None:
        unknown = sorted(set(only) - set(arrays))
        if unknown or base is None:
            raise UserError(f"cannot store a part of the model: {f'no parameters {unknown}' if unknown else 'no base'}")
        arrays = {name: array for name, array in arrays.items() if name in set(only)}
    orbax_files.write_orbax(path, model.config, arrays, source_dir=source_dir, base=base, base_lora=base_lora)


def convert(
    src: str | os.PathLike, out: str | os.PathLike, *, dtype: str | None = None, lora: str = "keep"
) -> GraniteSpeechConfig:
    """Convert a Hugging Face directory to a complete Orbax one; `dtype` None keeps the source's. Return the config."""
    _check_choices(dtype, lora)
    config, arrays = read_model(src, lora=lora, dtype=dtype)
    orbax_files.write_orbax(out, config, arrays, source_dir=src)
    return config


def export(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    lora: str = "keep",
    max_shard_bytes: int = hf_files.MAX_SHARD_BYTES,
) -> GraniteSpeechConfig:
    """Write an Orbax model directory, a partial one with its base, as a Hugging Face directory. Return the config."""
    _check_choices(dtype, lora)
    config, arrays = read_model(checkpoint, lora=lora, dtype=dtype)
    hf_files.write_hf(out, config, arrays, source_dir=checkpoint, max_shard_bytes=max_shard_bytes)
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
    config, arrays = orbax_files.read_orbax(path, shardings)
    if manifest.base is not None:
        folded = manifest.base_lora == "merge"
        _, rest = read_model(manifest.base, lora=manifest.base_lora, shardings=None if folded else shardings)
        arrays = {**rest, **arrays}
    return config, arrays


def _check_complete(path: str | os.PathLike, config: GraniteSpeechConfig, arrays: Mapping[str, Any]) -> None:
    expected = tree.shapes(config)
    problems = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in arrays],
        "unexpected": [name for name in arrays if name not in expected],
        "wrong shape": [
            f"{name} is {tuple(arrays[name].shape)}, config.json asks for {shape}"
            for name, shape in expected.items()
            if name in arrays and tuple(arrays[name].shape) != shape
        ],
    }
    tree.check(os.fspath(path), problems, "convert or save it again, or correct its config.json")


def _check_choices(dtype: str | None, lora: str) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if lora not in LORA:
        raise UserError(f"lora {lora!r} is not one of {', '.join(LORA)}")


def _shardings(config: GraniteSpeechConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    return param_shardings(nnx.state(tree.abstract_model(config)), mesh)


def _cast(array: Any, dtype: str, name: str) -> Any:
    """Cast, refusing to turn a number into infinity (float16 ends at 65504)."""
    if array.dtype == jnp.dtype(dtype):
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(jnp.dtype(dtype))
    xp = jnp if isinstance(array, jax.Array) else np
    if dtype == "float16" and not xp.array_equal(xp.isfinite(cast), xp.isfinite(array)):
        raise UserError(f"{name} holds values beyond the range of float16; use bfloat16 or float32")
    return cast


def _place(array: Any, sharding: Sharding | None) -> jax.Array:
    if isinstance(array, jax.Array) and (sharding is None or array.sharding == sharding):
        return array
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))
