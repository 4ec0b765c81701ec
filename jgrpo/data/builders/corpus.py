# SPDX-License-Identifier: Apache-2.0
"""What both data sets share: rows of metadata meet clips, and every row becomes a record or a drop with a reason."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jgrpo.data.builders.checks import Checked, CheckLog, Workers, check_clip, progress
from jgrpo.data.builders.downloads import Download, Member, is_audio, stem
from model_port.errors import UserError

UNKNOWN = "unknown"  # the split of a row that is too damaged to tell


@dataclass(frozen=True)
class Row:
    """A usable row of the metadata.

    Attributes:
        id: of the record.
        file: the clip as the metadata name it.
        line: in the metadata file; of a JSON array, the position from 1.
        texts: the text columns.
    """

    id: str
    split: str
    file: str
    line: int
    speaker: str
    texts: dict[str, str]

    def drop(self, reason: str, detail: str = "") -> "RowDrop":
        """Return what is left of a row that cannot be used after all."""
        return RowDrop(self.id, self.split, self.file, self.line, reason, detail)


@dataclass(frozen=True)
class RowDrop:
    """A row that becomes no record, and why."""

    id: str
    split: str
    file: str
    line: int
    reason: str
    detail: str = ""

    def json(self) -> str:
        """Return the line of dropped/<split>.jsonl."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "split"}, ensure_ascii=False)


@dataclass(frozen=True)
class Side:
    """A file that lies among the clips and is needed to complete the rows.

    Attributes:
        name: what messages call it.
        is_it: whether a member of a download is the one, by name.
        complete: is given its contents, and may change rows and move them to the drops.
    """

    name: str
    is_it: Callable[[str], bool]
    complete: Callable[[bytes], None]


@dataclass
class Metadata:
    """What the metadata files say; clips have not been looked at.

    Attributes:
        splits: those that are built, in order.
        downloads: where the clips are.
        about: what was read, for jgrpo.json.
        rows: usable rows by the stem of their clip's name, which is their id.
        drops: rows that are unusable by themselves.
        counts: rows read, of each split.
        side: a file among the clips that completes the rows.
    """

    splits: tuple[str, ...]
    downloads: list[Download]
    about: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    drops: list[RowDrop] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    side: Side | None = None

    def __post_init__(self):
        self.counts.update(dict.fromkeys(self.splits, 0))

    def take(self, found: Row | RowDrop) -> None:
        """Count what a line of a metadata file is, and keep it; of two rows of one id the first counts."""
        self.counts[found.split] += 1
        if isinstance(found, Row) and found.id in self.rows:
            first = self.rows[found.id]
            same = "the same texts" if found.texts == first.texts else "other texts"
            found = found.drop("duplicate id", f"{same} as line {first.line}")
        if isinstance(found, Row):
            self.rows[found.id] = found
        else:
            self.drops.append(found)

    def drop(self, name: str, reason: str, detail: str) -> None:
        """Move a row to the drops."""
        self.drops.append(self.rows.pop(name).drop(reason, detail))


@dataclass(frozen=True, slots=True)
class Record:
    """A row with its clip, and the download that the clip is in."""

    row: Row
    clip: Checked
    download: Download


@dataclass(frozen=True)
class Contents:
    """What a build will write: records in the order of the downloads, with all that is known of them."""

    records: dict[str, list[Record]]
    drops: dict[str, list[RowDrop]]
    about: dict[str, Any]

    def reasons(self) -> dict[str, dict[str, int]]:
        """Count the drops of each split by reason."""
        return {split: dict(Counter(drop.reason for drop in drops)) for split, drops in self.drops.items()}


def plan(metadata: Metadata, *, workers: Workers, log: CheckLog) -> Contents:
    """Decode every clip that a row needs, complete the rows, and decide on each of them.

    Raises:
        UserError: a damaged archive, a missing side file, or a split without a record.
    """
    clips = _Clips(metadata, log)
    with progress("checking", len(metadata.rows)) as count:
        for download in metadata.downloads:
            for name, _, member, (samples, reason, detail) in workers.map(check_clip, clips.unknown(download, count)):
                clips.add(Checked(name, member.size, member.changed, samples, reason, detail))
                count()
    if metadata.side is not None and not clips.completed:
        raise UserError(f"{metadata.downloads[0].path}: there is no {metadata.side.name} in it, which is needed.")
    drops = {split: [] for split in metadata.splits}
    records = {split: [] for split in metadata.splits}
    for drop in metadata.drops:
        drops.setdefault(drop.split, []).append(drop)
    for clip, row in metadata.rows.items():
        checked = clips.found.get(clip)
        if checked is None:
            drops[row.split].append(row.drop("missing clip"))
        elif checked.reason:
            drops[row.split].append(row.drop(checked.reason, checked.detail))
    for clip, download in clips.places.items():
        row, checked = metadata.rows.get(clip), clips.found[clip]
        if row is not None and not checked.reason:
            records[row.split].append(Record(row, checked, download))
    for split in {*metadata.counts, *drops}:
        read, kept, dropped = metadata.counts[split], len(records.get(split, ())), len(drops.get(split, ()))
        assert read == kept + dropped, f"{split}: {read} rows were read, {kept} kept and {dropped} dropped"
    for split in drops:
        drops[split].sort(key=lambda drop: (drop.line, drop.id))
    counts = {"rows": dict(metadata.counts), "clips_without_row": clips.unasked}
    made = Contents(records, drops, metadata.about | counts)
    _refuse_empty(made, metadata)
    return made


class _Clips:
    """The clips of all downloads, as one pass over them meets them.

    Attributes:
        found: what is known of a clip, by stem.
        places: the download that a clip is in, by stem and in their order.
        unasked: audio files that no row names, or a second one of a name.
        completed: whether the side file came by.
    """

    def __init__(self, metadata: Metadata, log: CheckLog):
        self.found: dict[str, Checked] = {}
        self.places: dict[str, Download] = {}
        self.unasked = 0
        self.completed = False
        self._metadata = metadata
        self._wanted = set(metadata.rows)
        self._dropped = {drop.id for drop in metadata.drops}
        self._log = log

    def add(self, checked: Checked) -> None:
        self._log.add(checked)
        self.found[stem(checked.name)] = checked

    def unknown(self, download: Download, count: Callable[[], Any]) -> Iterator[tuple[str, bytes, Member]]:
        """Yield name, bytes and member of each clip that no earlier build has decoded."""
        for member in download.members(self._pick):
            if not is_audio(member.name):
                self._metadata.side.complete(member.read())
                self.completed = True
                continue
            self.places[stem(member.name)] = download
            known = self._log.get(member.name, member.size, member.changed)
            if known is None:
                yield member.name, member.read(), member
            else:
                self.found[stem(member.name)] = known
                count()

    def _pick(self, name: str) -> bool:
        if not is_audio(name):
            side = self._metadata.side
            return side is not None and not self.completed and side.is_it(name)
        clip = stem(name)
        if clip not in self._wanted:
            self.unasked += clip not in self._dropped
            return False
        self._wanted.remove(clip)  # a second file of the same name is nobody's
        return True


def _refuse_empty(made: Contents, metadata: Metadata) -> None:
    reasons = made.reasons()
    for split, records in made.records.items():
        if not records:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons[split].items()))
            places = ", ".join(str(download.path) for download in metadata.downloads)
            raise UserError(
                f"the split {split} has no usable row ({counts or 'it has no rows at all'}); "
                f"the clips were looked for in {places}."
            )


def texts_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return the text columns of a row and the first of them that is no text or empty, or "".

    Args:
        columns: name in the record -> name in the row.
    """
    texts = {name: row[column] for name, column in columns.items()}
    empty = [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]
    return texts, empty[0] if empty else ""
