# SPDX-License-Identifier: Apache-2.0
"""Data sets that `jgrpo data build` has made: a split of one, as examples whose audio is read by record.

A directory of a version holds the record files of TFDS, and beside them `index/SPLIT.jsonl` (a line per record, in
their order: everything but the audio) and `jgrpo.json` (what the data set is). The texts are read once, from the index;
a record is opened when its audio is needed.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jgrpo.data.examples import Examples, clip_features, one_store, refuse
from jgrpo.data.prompts import Task, ask, check_templates
from model_port.audio import load_audio
from model_port.errors import UserError
from model_port.features import NUM_FEATURES, num_frames

CARD = "jgrpo.json"
FORMAT = 1
# A split, or a part of it as TFDS writes it: validation[:500], train[50%:], train[-10%:].
SPLIT = re.compile(r"(?P<path>.+):(?P<part>(?P<split>[A-Za-z]\w*)(\[(-?\d+%?)?:(-?\d+%?)?\])?)")


class Records:
    """The records of a split, at random; a data source of TFDS is opened when the first is read."""

    unit = "record"

    def __init__(self, name: str, directory: Path, split: str, *, ids: Sequence[str], start: int, features: bool):
        """Take records `start` and those after it, one for each id, of the split."""
        self.name = name
        self._directory, self._split = directory, split
        self._ids, self._start, self._features = ids, start, features

    def audio(self, row: int) -> tuple[str, ...]:
        """See Store."""
        return (self._ids[row - self._start],)

    def features(self, row: int, samples: Sequence[int]) -> list[Float[np.ndarray, "_ M"]]:
        """See Store; features that are in the record are those that would be computed."""
        record = self._record(row)
        (name,), (count,) = self.audio(row), samples
        where = f"record {row} of {self.name}"
        if not self._features:
            return [clip_features(load_audio(record["audio"], name=f"{name} ({where})"), count, name, where)]
        values = np.frombuffer(record["features"], np.float32).reshape(-1, NUM_FEATURES)
        if len(values) != num_frames(count):
            raise UserError(f"{where}: {len(values)} frames of features for {count} samples; build the data set again")
        return [values]

    def _record(self, row: int) -> dict[str, Any]:
        try:
            record = self._source[row]
        except Exception as error:  # what a damaged file raises is array_record's own affair
            raise UserError(f"record {row} of {self.name} cannot be read: {error}") from error
        found = record["id"].decode()
        if found != self.audio(row)[0]:
            raise UserError(
                f"record {row} of {self.name} is {found!r} and the index has {self.audio(row)[0]!r} there; build the "
                "data set again"
            )
        return record

    @functools.cached_property
    def _source(self) -> Sequence[dict[str, Any]]:
        return _builder(self._directory).as_data_source(self._split)


@dataclass(frozen=True)
class BuiltSet:
    """A built data set.

    Attributes:
        directory: of its version.
        task: what is asked about it, unless a config says otherwise.
        language: of the references, or None.
        splits: records of each split.
        features: whether the records hold features besides the audio.
    """

    directory: Path
    task: Task
    language: str | None
    splits: dict[str, int]
    features: bool


def parse_split(path: str) -> re.Match | None:
    """Return what PATH:SPLIT names, or None for what is no such thing, as the path of a file."""
    return None if Path(path).is_file() else SPLIT.fullmatch(path)


def open_built(path: str | Path) -> BuiltSet:
    """Return the built data set in a directory: that of a version, or one with a single version below it.

    Raises:
        UserError: no built data set there, several versions, or a format that this version does not read.
    """
    path = Path(path)
    found = [path] if (path / CARD).is_file() else sorted(card.parent for card in path.glob(f"*/{CARD}"))
    if not found:
        raise UserError(
            f"{path} is not a built data set: neither it nor a directory in it holds {CARD}; `jgrpo data build` "
            "makes one"
        )
    if len(found) > 1:
        versions = ", ".join(one.name for one in found)
        raise UserError(f"{path} holds several data sets ({versions}); name one of them: {found[-1]}:SPLIT")
    card = found[0] / CARD
    try:
        facts = json.loads(card.read_text())
        if facts["format"] != FORMAT:
            raise UserError(f"{card} has format {facts['format']!r}; this version reads format {FORMAT}")
        return BuiltSet(
            directory=found[0],
            task=Task(tuple(facts["task"]["prompts"]), facts["task"]["reference"]),
            language=facts["language"],
            splits={name: split["records"] for name, split in facts["splits"].items()},
            features=facts["features"],
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{card} is damaged ({type(error).__name__}: {error}); build the data set again") from error


def read_built(path: str, *, prompts: Sequence[str] = (), reference: str = "", vary: bool = False) -> Examples:
    """Return the examples of PATH:SPLIT; arguments as for read_manifest, with the data set's own task by default.

    Raises:
        UserError: no such data set or split, no records in that part of it, an index that does not belong to the
            records, or templates and a column that do not belong to the data set.
    """
    parts = parse_split(path)
    built = open_built(parts["path"])
    split = parts["split"]
    if split not in built.splits:
        raise UserError(f"{path}: {built.directory} has no split {split!r}; it has {', '.join(built.splits)}")
    start, stop = _bounds(path, built, parts["part"], split)
    columns = read_index(built, split, start, stop)
    samples = np.asarray(columns.pop("samples"), np.int32)[:, None]
    store = Records(path, built.directory, split, ids=columns["id"], start=start, features=built.features)
    rows = range(start, stop)
    if built.language is not None:
        columns["language"] = [built.language] * len(rows)
    templates, answer = prompts or built.task.prompts, reference or built.task.reference
    if answer not in columns:
        raise UserError(f"{path}: the references are to be {answer!r}; there are {', '.join(columns)}")
    blank = [i for i, text in enumerate(columns[answer]) if not isinstance(text, str) or not text.strip()]
    refuse(path, [(rows[i], f"{answer!r} is {columns[answer][i]!r}; a text is needed") for i in blank], unit="record")
    check_templates(templates, tuple(columns), 1)
    known = columns["id"] if vary else None
    asked, faults = ask(templates, columns, known, len(rows))
    refuse(path, [(rows[i], fault) for i, fault in faults], unit="record")
    return one_store(store, rows, samples, prompts=asked, references=columns[answer], columns=columns)


def read_index(built: BuiltSet, split: str, start: int, stop: int) -> dict[str, list[Any]]:
    """Return the columns of the index of some records.

    Raises:
        UserError: another number of lines than of records, or a line that lacks a column.
    """
    path = built.directory / "index" / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; build the data set again")
    with path.open("rb") as file:
        lines = file.read().splitlines()
    records = _builder(built.directory).info.splits[split].num_examples
    if not len(lines) == records == built.splits[split]:
        raise UserError(
            f"{path} has {len(lines)} lines, {CARD} counts {built.splits[split]} records and the record files hold "
            f"{records}; build the data set again"
        )
    columns: dict[str, list[Any]] = {}
    texts: dict[str, str] = {}  # a speaker, or a sentence that many have read, is held once
    for number, line in enumerate(lines[start:stop], start=start):
        row = json.loads(line)
        if columns and row.keys() != columns.keys():
            raise UserError(f"{path}: line {number + 1} has the keys {', '.join(row)}; build the data set again")
        for name, value in row.items():
            columns.setdefault(name, []).append(texts.setdefault(value, value) if isinstance(value, str) else value)
    return columns


def _bounds(path: str, built: BuiltSet, part: str, split: str) -> tuple[int, int]:
    """Return the first record of a part of a split and the one after its last, as TFDS understands the part."""
    from tensorflow_datasets.core import ReadInstruction

    try:
        (found,) = ReadInstruction.from_spec(part).to_absolute(_builder(built.directory).info.splits)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path}: {part} is no part of {built.splits[split]} records ({error})") from error
    start, stop = found.from_ or 0, built.splits[split] if found.to is None else found.to
    if start >= stop:
        raise UserError(f"{path}: {part} of {built.splits[split]} records holds none; take a larger part")
    return start, stop


def _builder(directory: Path):
    """Return the TFDS builder of a version's directory; TFDS is imported where data sets are built or read."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises errors of its own for what it cannot make out
        raise UserError(f"{directory} cannot be read ({error}); build the data set again") from error
