# SPDX-License-Identifier: Apache-2.0
"""CoVoST2: translations of Common Voice 4 (Wang et al., facebookresearch/covost), as a TFDS builder."""

import csv
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from jgrpo.data.builders.builder import SpeechBuilder, SpeechConfig
from jgrpo.data.builders.corpus import UNKNOWN, Metadata, Row, RowDrop, Side
from jgrpo.data.builders.downloads import Archive, Download, Folder, find_archives, stem
from jgrpo.data.prompts import TASKS, Task
from model_port.errors import UserError

LAYOUT = """\
The directory given as --manual-dir holds the downloads as they are, or unpacked (here for covost2/en_de):

  covost_v2.en_de.tsv.tar.gz         from https://dl.fbaipublicfiles.com/covost/; or the .tsv in it
  en.tar.gz                          English of Common Voice 4 (2019-12-10), with clips/ and validated.tsv in it; the
                                     name may be cv-corpus-4-2019-12-10-en.tar.gz; or unpacked:
                                     en/clips/ and en/validated.tsv, also below cv-corpus-4-2019-12-10/
"""

LANGUAGES = {
    "ar": "Arabic",
    "ca": "Catalan",
    "cy": "Welsh",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian",
    "fr": "French",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "lv": "Latvian",
    "mn": "Mongolian",
    "nl": "Dutch",
    "pt": "Portuguese",
    "ru": "Russian",
    "sl": "Slovenian",
    "sv-SE": "Swedish",
    "ta": "Tamil",
    "tr": "Turkish",
    "zh-CN": "Chinese",
}
FROM_ENGLISH = ("ar", "ca", "cy", "de", "et", "fa", "id", "ja", "lv", "mn", "sl", "sv-SE", "ta", "tr", "zh-CN")
SPLITS = {"train": "train", "train_covost": "train", "dev": "validation", "test": "test"}  # of the TSV -> ours
UNTRANSLATED = "REMOVE"  # what translators wrote about a sentence that should not be there
SIDE_FILE = "validated.tsv"


@dataclasses.dataclass(eq=False)
class Covost2Config(SpeechConfig):
    """A language pair.

    Attributes:
        source, target: codes of Common Voice.
    """

    source: str = "en"
    target: str = "de"


def make_config(source: str, target: str, *, features: bool = False) -> Covost2Config:
    """Return the config of a pair.

    >>> make_config("en", "zh-CN", features=True).name
    'en_zh-CN_features'
    """
    name = f"{source}_{target}_features" if features else f"{source}_{target}"
    return Covost2Config(name=name, source=source, target=target, features=features)


class Covost2(SpeechBuilder):
    __doc__ = f"""CoVoST2 of one language pair.

{LAYOUT}
    Records: id (the clip's name without suffix), audio (the bytes of its file), samples (at 16 kHz), speaker (Common
    Voice's client_id), sentence, translation.
    """

    name = "covost2"
    MANUAL_DOWNLOAD_INSTRUCTIONS = LAYOUT
    BUILDER_CONFIGS = [
        make_config(*pair, features=features)
        for pair in [("en", code) for code in FROM_ENGLISH] + [(code, "en") for code in LANGUAGES if code != "en"]
        for features in (False, True)
    ]

    @property
    def texts(self) -> tuple[str, ...]:
        return ("sentence", "translation")

    @property
    def task(self) -> Task:
        return TASKS["covost2"]

    @property
    def language(self) -> str:
        return LANGUAGES[self.builder_config.target]

    def read(self, manual_dir: Path) -> Metadata:
        language, pair = self.builder_config.source, f"{self.builder_config.source}_{self.builder_config.target}"
        table, clips = find(manual_dir, language, pair)
        about = {
            "metadata": [str(table.relative_to(manual_dir))],
            "audio": [str(clips.path.relative_to(manual_dir))],
        }
        metadata = Metadata(("train", "validation", "test"), [clips], about)
        for line, cells in read_table(_open_table(table), str(table), ("path", "translation", "split")):
            metadata.take(_row(line, cells))
        metadata.side = Side(SIDE_FILE, lambda name: is_side_file(name, language), lambda data: _join(metadata, data))
        return metadata


def find(manual_dir: Path, language: str, pair: str) -> tuple[Path, Download]:
    """Return the table of translations and the clips of a language, or raise a UserError with the layout."""
    table = f"covost_v2.{pair}.tsv"
    roots = [manual_dir, manual_dir / language, *sorted(manual_dir.glob("cv-corpus-*/"))]
    names = [f"{table}{suffix}" for suffix in ("", ".tar.gz")]
    tables = [root / name for root in roots for name in names if (root / name).is_file()]
    archives = [path for root in roots for path in find_archives(root, (language, f"cv-corpus-*-{language}"))]
    folders = [path for root in roots for path in (root / language, root) if (path / "clips").is_dir()]
    missing = [] if tables else [f"{table}.tar.gz (nor {table})"]
    missing += [] if archives or folders else [f"{language}.tar.gz (nor {language}/clips/)"]
    if missing:
        raise UserError(f"{manual_dir} has no {', no '.join(missing)}.\n{LAYOUT}")
    if len(archives) > 1:
        raise UserError(f"{manual_dir} has several archives of {language}: {', '.join(map(str, archives))}; keep one.")
    return tables[0], Archive(archives[0]) if archives else Folder(folders[0])


def is_side_file(name: str, language: str) -> bool:
    """Whether a member of an archive is the validated.tsv of a language.

    >>> [is_side_file(f"{folder}validated.tsv", "en") for folder in ("", "en/", "cv-corpus-4/en/", "fr/")]
    [True, True, True, False]
    """
    path = PurePosixPath(name)
    folder = path.parent.name
    return path.name == SIDE_FILE and (folder in ("", language) or folder.startswith("cv-corpus"))


def read_table(text: Iterator[str], name: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield line number and named cells of a tab-separated table, None for a line with too few or too many cells.

    Quotes are letters, and a backslash takes the meaning from what follows it, as in CoVoST's own reader.

    Raises:
        UserError: a column that is not there, or a file that is no such table.
    """
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
    try:
        header = next(reader, [])
        missing = [column for column in columns if column not in header]
        if missing:
            found = ", ".join(header) or "none"
            raise UserError(f"{name}: no column {', '.join(missing)}; the first line has {found}.")
        for cells in reader:
            if cells:
                yield reader.line_num, dict(zip(header, cells, strict=True)) if len(cells) == len(header) else None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a table in UTF-8 after line {reader.line_num} ({error}).") from error


def _open_table(path: Path) -> Iterator[str]:
    """Open a table, or the only file of an archive of one."""
    if path.suffix == ".tsv":
        data = path.read_bytes()
    else:
        # macOS's tar adds a hidden companion to each file.
        tables = Archive(path).members(lambda name: name.endswith(".tsv") and "/._" not in f"/{name}")
        data = b"".join(member.read() for member in tables)
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")


def _row(line: int, cells: dict[str, str] | None) -> Row | RowDrop:
    """Return a line of the table as a row that lacks its sentence, or why it is none."""
    if cells is None:
        return RowDrop("", UNKNOWN, "", line, "bad row", "too few or too many cells")
    file, name = cells["path"], stem(cells["path"])
    split = SPLITS.get(cells["split"], UNKNOWN)
    translation = cells["translation"]
    if split == UNKNOWN or not name:
        return RowDrop(name, split, file, line, "bad row", f"path {file!r}, split {cells['split']!r}")
    if not translation.strip():
        return RowDrop(name, split, file, line, "empty text", "translation")
    if UNTRANSLATED in translation:
        return RowDrop(name, split, file, line, "REMOVE", translation)
    return Row(name, split, file, line, speaker="", texts={"translation": translation})


def _join(metadata: Metadata, data: bytes) -> None:
    """Complete the rows by speaker and sentence; those that are not in validated.tsv move to the drops."""
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    name = f"{metadata.downloads[0].path}: {SIDE_FILE}"
    joined, bad, repeated = set(), 0, 0
    for _, cells in read_table(text, name, ("client_id", "path", "sentence")):
        if cells is None:
            bad += 1
            continue
        clip = stem(cells["path"])
        row = metadata.rows.get(clip)
        repeated += clip in joined
        if row is None or clip in joined:
            continue
        joined.add(clip)
        texts = {"sentence": cells["sentence"], **row.texts}
        metadata.rows[clip] = dataclasses.replace(row, speaker=cells["client_id"], texts=texts)
    for clip in [clip for clip in metadata.rows if clip not in joined]:
        metadata.drop(clip, "no transcript", f"not in {SIDE_FILE}")
    for clip in [clip for clip, row in metadata.rows.items() if not row.texts["sentence"].strip()]:
        metadata.drop(clip, "empty text", "sentence")
    metadata.about |= {"validated_bad_rows": bad, "validated_repeated_rows": repeated}
