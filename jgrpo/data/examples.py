# SPDX-License-Identifier: Apache-2.0
"""Examples in columns, whatever they come from: compact enough for the hundreds of thousands of a corpus."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from model_port.audio import load_audio
from model_port.errors import UserError
from model_port.features import SAMPLE_RATE, log_mel

MAX_REPORTED = 10


@runtime_checkable
class Store(Protocol):
    """Where the clips of a data set are.

    Attributes:
        name: of the data set in messages: the path it was opened by.
        unit: what its rows are: "line" or "record".
    """

    name: str
    unit: str

    def audio(self, row: int) -> tuple[str, ...]:
        """Return what the clips of a row are called."""

    def features(self, row: int, samples: Sequence[int]) -> list[Float[np.ndarray, "_ M"]]:
        """Return the log-mel features of a row's clips, which must have these lengths.

        Raises:
            UserError: a clip that cannot be read, or is not what it was; it is named.
        """


class Files:
    """The audio files of a manifest's lines."""

    unit = "line"

    def __init__(self, name: str, clips: dict[int, tuple[str, ...]]):
        self.name = name
        self._clips = clips

    def audio(self, row: int) -> tuple[str, ...]:
        """See Store."""
        return self._clips[row]

    def features(self, row: int, samples: Sequence[int]) -> list[Float[np.ndarray, "_ M"]]:
        """See Store."""
        where = f"line {row} of {self.name}"
        return [
            clip_features(load_audio(path), count, path, where)
            for path, count in zip(self._clips[row], samples, strict=True)
        ]


def clip_features(wave: np.ndarray, samples: int, name: str, where: str) -> Float[np.ndarray, "_ M"]:
    """Return the features of a clip; its length must be that which the shapes were planned with."""
    if len(wave) != samples:
        raise UserError(
            f"{name} had {samples} samples when the run started and has {len(wave)} now; "
            "audio files must not change during a run."
        )
    try:
        return log_mel(wave)
    except UserError as error:
        raise UserError(f"{name} ({where}): {error}") from error


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example, as a person looks at it.

    Attributes:
        row: its line in the manifest, from 1, or its record in the split, from 0.
        audio: names of its clips: paths, or the id of a record.
        samples: length of each clip at 16 kHz.
        columns: what there is besides audio, prompt and reference; None where the example lacks one.
    """

    row: int
    audio: tuple[str, ...]
    samples: tuple[int, ...]
    prompt: str
    reference: str
    columns: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """N examples of one or more data sets, in order.

    Attributes:
        stores: of the data sets.
        store: which of them each example is in.
        rows: its row there; see Example.
        samples: length of each clip at 16 kHz; 0 after an example's last one.
        columns: N values of each; None where an example lacks it.
    """

    stores: tuple[Store, ...]
    store: Int[np.ndarray, " N"]
    rows: Int[np.ndarray, " N"]
    samples: Int[np.ndarray, "N C"]
    prompts: list[str]
    references: list[str]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]  # an index beyond the end must end an iteration
        store, row = self.stores[self.store[index]], int(self.rows[index])
        return Example(
            row=row,
            audio=store.audio(row),
            samples=self._lengths(index),
            prompt=self.prompts[index],
            reference=self.references[index],
            columns={name: values[index] for name, values in self.columns.items()},
        )

    def features(self, index: int) -> list[Float[np.ndarray, "_ M"]]:
        """Return the log-mel features of an example's clips; see Store."""
        return self.stores[self.store[index]].features(int(self.rows[index]), self._lengths(index))

    def where(self, index: int) -> str:
        """Return how messages call an example.

        Returns:
            Such as "line 3 of data/train.jsonl".
        """
        store = self.stores[self.store[index]]
        return f"{store.unit} {self.rows[index]} of {store.name}"

    @functools.cached_property
    def name(self) -> str:
        """The data sets, by the paths they were opened by."""
        return ", ".join(store.name for store in self.stores)

    def seconds(self) -> float:
        """Return the length of all audio."""
        return float(self.samples.sum(dtype=np.int64)) / SAMPLE_RATE

    def take(self, indices: Int[np.ndarray, " K"]) -> "Examples":
        """Return these examples."""
        if len(indices) == len(self) and (indices == np.arange(len(self))).all():
            return self
        chosen = indices.tolist()
        return Examples(
            stores=self.stores,
            store=self.store[indices],
            rows=self.rows[indices],
            samples=self.samples[indices],
            prompts=[self.prompts[i] for i in chosen],
            references=[self.references[i] for i in chosen],
            columns={name: [values[i] for i in chosen] for name, values in self.columns.items()},
        )

    def _lengths(self, index: int) -> tuple[int, ...]:
        return tuple(count for count in self.samples[index].tolist() if count)


def one_store(
    store: Store,
    rows: Sequence[int] | range,
    samples: Int[np.ndarray, "N C"],
    *,
    prompts: list[str],
    references: list[str],
    columns: dict[str, list[Any]],
) -> Examples:
    """Return the examples of one data set."""
    return Examples(
        stores=(store,),
        store=np.zeros(len(rows), np.int16),
        rows=np.asarray(rows, np.int32),
        samples=samples,
        prompts=prompts,
        references=references,
        columns=columns,
    )


def join(parts: Sequence[Examples]) -> Examples:
    """Return the examples of all parts, one part after the other; every part has all columns then."""
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in part.columns)
    clips = max(part.samples.shape[1] for part in parts)
    before = np.cumsum([0, *(len(part.stores) for part in parts)])
    return Examples(
        stores=tuple(store for part in parts for store in part.stores),
        store=np.concatenate([part.store + np.int16(k) for part, k in zip(parts, before[:-1], strict=True)]),
        rows=np.concatenate([part.rows for part in parts]),
        samples=np.concatenate([np.pad(part.samples, ((0, 0), (0, clips - part.samples.shape[1]))) for part in parts]),
        prompts=[text for part in parts for text in part.prompts],
        references=[text for part in parts for text in part.references],
        columns={
            name: [value for part in parts for value in part.columns.get(name, [None] * len(part))] for name in names
        },
    )


def clip_lengths(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "N C"]:
    """Return the lengths of each example's clips as an array, 0 after the last."""
    samples = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        samples[i, : len(row)] = row
    return samples


def identities(columns: dict[str, list[Any]], otherwise: Sequence[str]) -> list[str]:
    """Return what each example is known by, whatever its place: its id, where it has one."""
    ids = columns.get("id", [None] * len(otherwise))
    return [str(own) if own is not None else other for own, other in zip(ids, otherwise, strict=True)]


def refuse(
    name: str | Path,
    faults: Iterable[tuple[int, str]],
    *,
    unit: str = "line",
    remedy: str = "",
    most: int | None = MAX_REPORTED,
) -> None:
    """Raise one UserError that names the first `most` (row, fault) pairs, or all, unless there are none."""
    faults = sorted(faults)
    if not faults:
        return
    shown = [f"  {unit} {row}: {fault}" for row, fault in faults[:most]]
    rest = [f"  and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
    count = len({row for row, _ in faults})
    head = f"{name}: {count} unusable {unit}{'s' if count > 1 else ''}; correct or remove{remedy}:"
    raise UserError("\n".join([head, *shown, *rest]))
