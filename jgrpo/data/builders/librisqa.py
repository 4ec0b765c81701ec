# SPDX-License-Identifier: Apache-2.0
"""LibriSQA: questions and answers about LibriSpeech (Zhao et al., ZihanZhao/LibriSQA), as a TFDS builder."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jgrpo.data.builders.builder import SpeechBuilder, SpeechConfig
from jgrpo.data.builders.corpus import Metadata, Row, RowDrop, texts_of
from jgrpo.data.builders.downloads import Archive, Download, Folder, find_archives, stem
from jgrpo.data.prompts import TASKS, Task
from model_port.errors import UserError

LAYOUT = """\
The directory given as --manual-dir holds the downloads as they are, or unpacked:

  LibriSQA-PartI/LibriSQA-PartI-train.json     from https://huggingface.co/datasets/ZihanZhao/LibriSQA;
  LibriSQA-PartI/LibriSQA-PartI-test.json      PartII for librisqa/part2; may also lie beside the audio
  train-clean-360.tar.gz                       from https://www.openslr.org/12; or unpacked:
  test-clean.tar.gz                            LibriSpeech/train-clean-360/, LibriSpeech/test-clean/
"""

AUDIO = {"train": "train-clean-360", "test": "test-clean"}  # what a JSON file speaks of
UTTERANCE = re.compile(r"(\d+)-\d+-\d+")  # speaker, chapter, utterance
GROUPINGS = ("utterance", "speaker")
DEFAULT_FRACTION = 0.2  # paper 4.1: a fifth of the training set is held out

# Name of a text in the records -> in the JSON.
TEXTS = {
    "part1": {"question": "question", "answer": "answer"},
    "part2": {
        "question": "question_and_option",
        "answer": "answer",
        "answer_and_analysis": "answer_and_analysis",
    },
}
TRANSCRIPT = "text"  # the same in both; kept where there is one


@dataclasses.dataclass(eq=False)
class LibrisqaConfig(SpeechConfig):
    """One part of LibriSQA with one validation split.

    Attributes:
        part: part1 (free answers) or part2 (four options).
        grouping: what the validation split is drawn by; with speaker no one is heard in both.
        fraction: of the training rows that the validation split gets; 0 for none.
        seed: of that draw.
    """

    part: str = "part1"
    grouping: str = "utterance"
    fraction: float = DEFAULT_FRACTION
    seed: int = 0


def make_config(
    part: str,
    *,
    grouping: str = "utterance",
    fraction: float = DEFAULT_FRACTION,
    seed: int = 0,
    features: bool = False,
) -> LibrisqaConfig:
    """Return a config whose name says everything that is not the default.

    >>> make_config("part2", grouping="speaker", fraction=0.125, seed=7, features=True).name
    'part2_speaker_validation0.125_seed7_features'
    """
    if grouping not in GROUPINGS:
        raise UserError(f"the grouping is {grouping!r}; one of {', '.join(GROUPINGS)} is needed.")
    if not 0 <= fraction < 1:
        raise UserError(f"the validation fraction is {fraction}; at least 0 and less than 1 is needed.")
    if seed < 0:
        raise UserError(f"the seed is {seed}; 0 or more is needed.")
    parts = [part]
    parts += [grouping] if grouping != "utterance" else []
    parts += [f"validation{fraction:g}"] if fraction != DEFAULT_FRACTION else []
    parts += [f"seed{seed}"] if seed else []
    parts += ["features"] if features else []
    return LibrisqaConfig(
        name="_".join(parts), part=part, grouping=grouping, fraction=fraction, seed=seed, features=features
    )


class Librisqa(SpeechBuilder):
    __doc__ = f"""LibriSQA over LibriSpeech train-clean-360 and test-clean.

{LAYOUT}
    Records: id (of the utterance), audio (the bytes of its file), samples (at 16 kHz), speaker, question, answer,
    answer_and_analysis (Part II), text (the transcript; empty where the JSON has none). The question of Part II
    contains its options.

    The JSON names .wav files in places of its own; clips are found by the utterance's id.
    """

    name = "librisqa"
    MANUAL_DOWNLOAD_INSTRUCTIONS = LAYOUT
    BUILDER_CONFIGS = [
        make_config(part, grouping=grouping, features=features)
        for part in TEXTS
        for grouping in GROUPINGS
        for features in (False, True)
    ]

    @property
    def texts(self) -> tuple[str, ...]:
        return (*TEXTS[self.builder_config.part], TRANSCRIPT)

    @property
    def task(self) -> Task:
        return TASKS[f"librisqa_{self.builder_config.part}"]

    @property
    def language(self) -> str:
        return "English"

    def read(self, manual_dir: Path) -> Metadata:
        config = self.builder_config
        files, downloads = find(manual_dir, config.part)
        about = {
            "metadata": [str(path.relative_to(manual_dir)) for path in files.values()],
            "audio": [str(download.path.relative_to(manual_dir)) for download in downloads],
            "validation": {"grouping": config.grouping, "fraction": config.fraction, "seed": config.seed},
        }
        metadata = Metadata(tuple(files), downloads, about)
        for split, path in files.items():
            for line, entry in enumerate(_read_array(path, TEXTS[config.part]), start=1):
                metadata.take(_row(entry, split, line, TEXTS[config.part]))
        rows = metadata.rows
        about["rows_without_transcript"] = sum(not row.texts[TRANSCRIPT] for row in rows.values())
        held_out = draw_validation(
            {row.id: row.speaker for row in rows.values() if row.split == "train"},
            grouping=config.grouping,
            fraction=config.fraction,
            seed=config.seed,
        )
        for name in held_out:
            rows[name] = dataclasses.replace(rows[name], split="validation")
        metadata.counts["validation"] = len(held_out)
        metadata.counts["train"] -= len(held_out)
        if held_out:
            metadata.splits = ("train", "validation", "test")
        return metadata


def find(manual_dir: Path, part: str) -> tuple[dict[str, Path], list[Download]]:
    """Return the JSON file of each split and the audio of both, or raise a UserError with the layout."""
    prefix = f"LibriSQA-Part{'I' * int(part[-1])}"
    files, downloads, missing = {}, [], []
    for split, audio in AUDIO.items():
        name = f"{prefix}-{split}.json"
        places = [manual_dir / prefix / name, manual_dir / name]
        files[split] = next((path for path in places if path.is_file()), places[0])
        if not files[split].is_file():
            missing.append(f"{prefix}/{name}")
        archives = find_archives(manual_dir, (audio,))
        folders = [path for path in (manual_dir / "LibriSpeech" / audio, manual_dir / audio) if path.is_dir()]
        if archives:
            downloads.append(Archive(archives[0]))
        elif folders:
            downloads.append(Folder(folders[0]))
        else:
            missing.append(f"{audio}.tar.gz (or unpacked, LibriSpeech/{audio}/)")
    if missing:
        raise UserError(f"{manual_dir} has no {', no '.join(missing)}.\n{LAYOUT}")
    return files, downloads


def draw_validation(speakers: dict[str, str], *, grouping: str, fraction: float, seed: int) -> list[str]:
    """Return the ids held out of {id: speaker}: a function of the set of ids, not of their order.

    By speaker, whole speakers are drawn as long as the share stays within the fraction, or as near to it as one more
    brings it.
    """
    rng = np.random.default_rng(seed)
    ids = sorted(speakers)
    goal = round(fraction * len(ids))
    if grouping == "utterance":
        return [ids[i] for i in rng.permutation(len(ids))[:goal]]
    said: dict[str, list[str]] = {}
    for name in ids:
        said.setdefault(speakers[name], []).append(name)
    voices, held_out = sorted(said), []
    for i in rng.permutation(len(voices)):
        further = len(held_out) + len(said[voices[i]])
        if abs(further - goal) >= abs(len(held_out) - goal):
            break
        held_out += said[voices[i]]
    return held_out


def _read_array(path: Path, columns: dict[str, str]) -> list[Any]:
    """Return the array of a JSON file in which at least one entry has the columns."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}); download it again (a Git LFS pointer is not the file)."
        ) from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: one JSON array of objects is needed, not {type(entries).__name__}.")
    needed = {"speech_path", *columns.values()}
    if not any(isinstance(entry, dict) and needed <= entry.keys() for entry in entries):
        first = sorted(entries[0]) if isinstance(entries[0], dict) else type(entries[0]).__name__
        raise UserError(f"{path}: no entry has all of {', '.join(sorted(needed))}; the first one has {first}.")
    return entries


def _row(entry: Any, split: str, line: int, columns: dict[str, str]) -> Row | RowDrop:
    """Return an entry of the array as a row, or why it is none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("speech_path"), str):
        return RowDrop("", split, "", line, "bad row", "an object with the text speech_path is needed")
    file = entry["speech_path"]
    name = stem(file.replace("\\", "/"))
    missing = [column for column in columns.values() if column not in entry]
    if missing:
        return RowDrop(name, split, file, line, "bad row", f"{missing[0]} is missing")
    match = UTTERANCE.fullmatch(name)
    if match is None:
        return RowDrop(name, split, file, line, "bad row", "speech_path does not end in an utterance's id")
    texts, empty = texts_of(entry, columns)
    if empty:
        return RowDrop(name, split, file, line, "empty text", empty)
    transcript = entry.get(TRANSCRIPT)
    return Row(
        id=name,
        split=split,
        file=file,
        line=line,
        speaker=match[1],
        texts=texts | {TRANSCRIPT: transcript if isinstance(transcript, str) else ""},
    )
