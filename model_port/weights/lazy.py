"""Arrays that are read when they are needed, layer by layer: a model of any size passes through little memory."""

import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_port.errors import UserError

# A tile of both arrays stays in the cache while one is read along its rows and the other written along its own:
# copying a transposed matrix in tiles is six times as fast.
TILE = 128
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

        with ThreadPoolExecutor(COPIES) as threads:
            waiting = []
            for job in zip(places, self.layers(), strict=True):
                waiting.append(threads.submit(fill, *job))
                if len(waiting) > COPIES:
                    waiting.pop(0).result()
            for done in waiting:
                done.result()
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What `np.asarray` gives."""
        return (self if dtype is None else self.astype(dtype)).load()


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
    for row in range(0, value.shape[0], TILE):
        for column in range(0, value.shape[-1], TILE):
            tile = np.s_[row : row + TILE, ..., column : column + TILE]
            out[tile] = value[tile]


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
