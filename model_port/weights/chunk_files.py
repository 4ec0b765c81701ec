# SPDX-License-Identifier: Apache-2.0
"""Arrays that are still to be read, written into the files of an Orbax checkpoint: zarr 2, without compression.

Orbax itself needs a whole stack in memory and hands the system a chunk at a time, which then takes most of the time:
see writing.write_pieces.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from etils import epath

from model_port.weights.config_files import read_json, to_json
from model_port.weights.lazy import Layer, LazyArray, Scratch, copy, in_threads
from model_port.weights.writing import write_pieces

CHUNK_BYTES = 2**23


def placeholder(array: LazyArray) -> np.ndarray:
    """Return what Orbax is to store in place of `array` until `write_arrays` puts it there: one element."""
    return np.zeros((1,) * len(array.shape), array.dtype)


def write_arrays(directory: epath.Path, arrays: Mapping[str, LazyArray], progress: Callable[[int], None]) -> None:
    """Write arrays over their placeholders, several layers at the same time.

    Args:
        directory: where Orbax made a directory for each, with a .zarray that says how elements are stored.
        progress: told the bytes of every layer, or small array, that is written; not in a thread.

    Raises:
        UserError: a value that the dtype of its array turns into an infinity.
    """
    tensors, memory = Scratch(), Scratch()

    def write(files: epath.Path, array: LazyArray, layer: tuple[int, ...], read: Layer) -> int:
        value = read(tensors)
        chunk = chunk_shape(array)[len(layer) :]
        data = memory.take(math.prod(chunk) * array.dtype.itemsize)
        for number in itertools.product(*map(range, map(_parts, value.shape, chunk))):
            part = value[tuple(slice(n * size, (n + 1) * size) for n, size in zip(number, chunk, strict=True))]
            if part.shape != chunk:
                data[:] = 0  # a file at the end of an array is as long as the others
            copy(data.view(array.dtype).reshape(chunk)[tuple(map(slice, part.shape))], part, array.name)
            with (files / ".".join(map(str, layer + number))).open("wb") as file:
                write_pieces(file, data)
        return value.size * array.dtype.itemsize

    def jobs() -> Iterator[Callable[[], int]]:
        for name, array in arrays.items():
            description = directory / name / ".zarray"
            shapes = {"shape": array.shape, "chunks": chunk_shape(array)}
            description.write_bytes(to_json({**read_json(description), **shapes}))
            if array.nbytes <= CHUNK_BYTES:
                layers = [((), lambda scratch, array=array: array.load())]
            else:
                numbers = ((layer,) for layer in range(array.shape[0])) if array.stacked else ((),)
                layers = zip(numbers, array.layers(), strict=True)
            for layer, read in layers:
                yield functools.partial(write, directory / name, array, layer, read)

    in_threads(jobs(), progress)


def chunk_shape(array: LazyArray) -> tuple[int, ...]:
    """Return the shape of the files: the whole array, or what halving the largest dimension of a layer makes of it.

    So a layer is written as it comes, and a host reads little beyond its own shards.
    """
    if array.nbytes <= CHUNK_BYTES:
        return array.shape
    chunk = [1, *array.shape[1:]] if array.stacked else list(array.shape)
    while math.prod(chunk) * array.dtype.itemsize > CHUNK_BYTES:
        largest = chunk.index(max(chunk))
        chunk[largest] = _parts(chunk[largest], 2)
    return tuple(chunk)


def _parts(length: int, size: int) -> int:
    return -(-length // size)
