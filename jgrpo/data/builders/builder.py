# SPDX-License-Identifier: Apache-2.0
"""The TFDS builder that both data sets are: a plan of records, written as ArrayRecord shards with the audio as it came.

It derives from ShardBasedBuilder. GeneratorBasedBuilder sorts its records in temporary files, which it writes with
TensorFlow as soon as they exceed one gigabyte.
"""

import dataclasses
import itertools
import json
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from jgrpo.data.builders.checks import Checked, CheckLog, Workers, clip_features, progress
from jgrpo.data.builders.corpus import Metadata, Record, plan
from jgrpo.data.prompts import Task
from model_port.errors import UserError
from model_port.features import NUM_FEATURES, SAMPLE_RATE, num_frames

FORMAT = 1  # of jgrpo.json
SHARD_BYTES = 128 << 20  # a shard's records are in memory while TFDS writes it


@dataclasses.dataclass(eq=False)
class SpeechConfig(tfds.core.BuilderConfig):
    """What the configs of all speech data sets can choose: whether log-mel features are stored beside the audio."""

    features: bool = False


class SpeechBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Speech with texts: {id, audio, samples, speaker, one Text per column}, and `features` where the config asks.

    Beside the files of TFDS it writes index/<split>.jsonl, dropped/<split>.jsonl and jgrpo.json.

    Args:
        workers: processes that decode; None for one per core.
        checks: file that keeps what was found out about the clips, for the next build after an interruption.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}
    url_infos = None  # nothing is downloaded; TFDS would look for checksums with a package that it does not require

    def __init__(self, *, workers: int | None = None, checks: Path | None = None, **kwargs):
        kwargs.setdefault("file_format", "array_record")
        self._workers, self._checks = workers, checks
        super().__init__(**kwargs)

    @property
    @abstractmethod
    def texts(self) -> tuple[str, ...]:
        """Names of the text columns."""

    @property
    @abstractmethod
    def task(self) -> Task:
        """What is asked about the data set unless a run says otherwise."""

    @property
    @abstractmethod
    def language(self) -> str:
        """The language of the references, in English."""

    @abstractmethod
    def read(self, manual_dir: Path) -> Metadata:
        """Read the metadata files and find the clips."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "audio": tfds.features.Scalar(np.object_),
            "samples": tfds.features.Scalar(np.int32),
            "speaker": tfds.features.Text(),
            **{name: tfds.features.Text() for name in self.texts},
        }
        if self.builder_config.features:
            features["features"] = tfds.features.Scalar(np.object_)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        """Write everything into the temporary directory, which gets its name when all of it is there."""
        manual_dir = Path(dl_manager.manual_dir)
        metadata = self.read(manual_dir)
        with Workers(self._workers) as workers, CheckLog(self._checks) as log:
            self._plan = plan(metadata, workers=workers, log=log)
            self._pool = workers
            self._check_room()
            super()._download_and_prepare(dl_manager, download_config)
        self._write_sides(manual_dir)

    def _shard_iterators_per_split(self, dl_manager) -> Mapping[str, list[Callable[[], Iterator]]]:
        shards = {}
        for split, records in self._plan.records.items():
            size = sum(_record_bytes(record.clip, self.builder_config.features) for record in records)
            count = min(-(-size // SHARD_BYTES), len(records))
            bounds = np.linspace(0, len(records), count + 1).astype(int).tolist()
            # One stream runs through all shards of a split: the archive is read once. The last shard reads to its
            # end, where the index is complete.
            stream = self._examples(split)
            sizes = [*(stop - start for start, stop in itertools.pairwise(bounds[:-1])), None]
            shards[split] = [lambda stream=stream, size=size: itertools.islice(stream, size) for size in sizes]
        return shards

    def _check_room(self) -> None:
        features = self.builder_config.features
        records = itertools.chain.from_iterable(self._plan.records.values())
        needed = sum(_record_bytes(record.clip, features) for record in records)
        free = shutil.disk_usage(self.data_dir).free
        if needed > free:
            raise UserError(
                f"{self.data_dir_root}: the records take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
                "make room, or choose another --out."
            )

    def _examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the records of a split, and write its index as they go."""
        records = self._plan.records[split]
        clips = _clips_again(records)
        if self.builder_config.features:
            clips = self._pool.map(clip_features, clips)
        path = Path(self.data_dir) / "index" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as index, progress(f"writing {split}", len(records)) as count:
            for key, (_, audio, record, *features) in enumerate(clips):
                row = record.row
                known = {"id": row.id, "speaker": row.speaker, "samples": record.clip.samples} | row.texts
                index.write(json.dumps(known, ensure_ascii=False) + "\n")
                yield key, known | {"audio": audio} | ({"features": features[0]} if features else {})
                count()

    def _write_sides(self, manual_dir: Path) -> None:
        folder, made = Path(self.data_dir), self._plan
        for split, records in made.records.items():
            written = self.info.splits[split].num_examples
            assert written == len(records), f"{split}: {written} records were written of {len(records)}"
        (folder / "dropped").mkdir()
        for split, drops in made.drops.items():
            text = "".join(drop.json() + "\n" for drop in drops)
            (folder / "dropped" / f"{split}.jsonl").write_text(text, encoding="utf-8")
        about = {
            "format": FORMAT,
            "task": dataclasses.asdict(self.task),
            "language": self.language,
            "features": self.builder_config.features,
            "splits": {split: _size(records) for split, records in made.records.items()},
            "drops": made.reasons(),
            "source": {"manual_dir": str(manual_dir), **made.about},
        }
        (folder / "jgrpo.json").write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _record_bytes(checked: Checked, features: bool) -> int:
    return checked.size + (num_frames(checked.samples) * NUM_FEATURES * 4 if features else 0)


def _size(records: list[Record]) -> dict[str, int | float]:
    samples = sum(record.clip.samples for record in records)
    return {"records": len(records), "hours": round(samples / SAMPLE_RATE / 3600, 4)}


def _clips_again(records: list[Record]) -> Iterator[tuple[str, bytes, Record]]:
    """Yield name and bytes of the records' clips, which lie in the downloads as they did when they were checked."""
    for download, group in itertools.groupby(records, key=lambda record: record.download):
        waiting = {record.clip.name: record for record in group}
        for member in download.members(lambda name, waiting=waiting: name in waiting):
            record = waiting.pop(member.name)
            if (member.name, member.size, member.changed) != record.clip.key:
                raise UserError(f"{download.path}: {member.name} has changed since it was checked; build again.")
            yield member.name, member.read(), record
            if not waiting:
                break
        if waiting:
            raise UserError(
                f"{download.path}: {next(iter(waiting))} has disappeared since it was checked; build again."
            )
