# SPDX-License-Identifier: Apache-2.0
"""Arrays that are read when they are needed, layer by layer: a model of any size passes through little memory."""

import collections
import dataclasses
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_port.errors import UserError

# A transposed matrix is copied in tiles, each first as it lies into a block that stays in the cache. The block's rows
# are longer than the tile's: at distances of a power of two they would drive each other out of the cache.
TILE = 256, 512
PADDING = 32
# Layers that are copied at the same time, each by a thread.
COPIES = min(4, os.cpu_count() or 1)


class Scratch(threading.local):
    """Memory that a thread reads one tensor after the other into; fresh memory costs more time than what it is for."""

    def __init__(self):
        self._memory = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """Return so many bytes, valid until this thread takes again."""
        if self._memory.nbytes < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes]


# Reads a slice; without scratch memory it returns an array of its own.
Layer = Callable[[Scratch | None], np.ndarray]


@dataclass(frozen=True)
class LazyArray:
    """An array that is known but not read.

    Attributes:
        name: of the parameter, for messages.
        shape: of the whole array.
        dtype: that `load` gives; layers may come in another one and are cast.
        stacked: whether the first axis is that of layers.
        layers: yields what reads the slices along the first axis, in their order, or, of an array that is not stacked,
            what reads the array itself. Each may be called in a thread, and may return a view of the scratch memory it
            is given.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    layers: Callable[[], Iterable[Layer]]

    @property
    def nbytes(self) -> int:
        """Bytes of the array once it is loaded."""
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: Any) -> "LazyArray":
        """Return the array with another dtype; values are cast as they are read, from what is stored."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def load(self, out: np.ndarray | None = None) -> np.ndarray:
        """Read the array, into `out` if it is given.

        Raises:
            UserError: a value that its dtype turns into an infinity.
        """
        if out is None:
            out = np.empty(self.shape, self.dtype)
        places = out if self.stacked else out[None]
        scratch = Scratch()

        def fill(place: np.ndarray, read: Layer) -> None:
            copy(place, read(scratch), self.name)

        in_threads(functools.partial(fill, *job) for job in zip(places, self.layers(), strict=True))
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What `np.asarray` gives."""
        return (self if dtype is None else self.astype(dtype)).load()


def in_threads(jobs: Iterable[Callable[[], Any]], done: Callable[[Any], None] = lambda result: None) -> None:
    """Run jobs at the same time, a few of them taken ahead, and tell `done` what each returned, in their order."""
    with ThreadPoolExecutor(COPIES) as threads:
        waiting = collections.deque()
        for job in jobs:
            waiting.append(threads.submit(job))
            if len(waiting) > COPIES:
                done(waiting.popleft().result())
        for job in waiting:
            done(job.result())


def load(array: Any) -> Any:
    """Return an array, read if it was not."""
    return array.load() if isinstance(array, LazyArray) else array


def layers(array: Any, *, stacked: bool) -> Iterator[np.ndarray]:
    """Yield the layers of an array, read or not, in its dtype; of one that is not stacked, the array itself."""
    if isinstance(array, LazyArray):
        for read in array.layers():
            yield cast(read(None), array.dtype, array.name)
    else:
        array = np.asarray(array)
        yield from array if stacked else (array,)


def copy(out: np.ndarray, value: np.ndarray, name: str) -> None:
    """Copy `value` into `out`, transposed or not, and cast it.

    Raises:
        UserError: a value that the dtype of `out` turns into an infinity.
    """
    if out.dtype != value.dtype:
        value = cast(value, out.dtype, name)
    # As plain integers: NumPy copies its own types without holding the interpreter.
    bits = f"u{out.dtype.itemsize}"
    out, value = out.view(bits), value.view(bits)
    if value.ndim < 2 or value.strides[-1] == value.itemsize:
        out[...] = value
        return
    rows, columns = TILE
    block = np.empty((columns, rows + PADDING), bits)
    for middle in np.ndindex(value.shape[1:-1]):
        source, target = value[:, *middle], out[:, *middle]
        for row, column in itertools.product(range(0, len(source), rows), range(0, source.shape[1], columns)):
            tile = np.s_[row : row + rows, column : column + columns]
            turned = block[tuple(map(slice, source[tile].T.shape))]
            turned[...] = source[tile].T
            target[tile] = turned.T


def contiguous(value: np.ndarray) -> np.ndarray:
    """Return `value` in C order, copied where it is not."""
    if value.flags.c_contiguous:
        return value
    out = np.empty(value.shape, value.dtype)
    copy(out, value, "")
    return out


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Cast a NumPy array, refusing to turn a number into an infinity (float16 ends at 65504).

    Raises:
        UserError: the parameter `name` holds such a number.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if np.dtype(dtype) != np.float32 and bool((~np.isfinite(result) & np.isfinite(array)).any()):
        wider = "bfloat16 or float32" if np.dtype(dtype) == np.float16 else "float32"
        raise UserError(f"{name} holds values beyond the range of {np.dtype(dtype).name}; use {wider}")
    return result
