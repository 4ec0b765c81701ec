"""JSON-lines manifests: one training or evaluation example per line.

    {"audio": "clips/1.flac", "prompt": "<|audio|> translate the speech to German.", "reference": "Guten Tag."}

`audio` is a path relative to the manifest, or a list of paths with one `<|audio|>` marker in the prompt for each. Any
further key is a column, passed on to the reward functions.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_port.audio import check_audio
from model_port.errors import UserError
from model_port.processor import AUDIO_MARKER

KEYS = ("audio", "prompt", "reference")
RESERVED = ("completions", "references")  # what a reward function is given besides the columns
MAX_REPORTED = 10
HEADER_THREADS = 16  # headers are read at the speed of the file system's answers


@dataclass(frozen=True, kw_only=True)
class Example:
    """One line of a manifest.

    Attributes:
        line: its number in the file, from 1.
        samples: length of each clip at 16 kHz, from the headers.
        columns: what the line holds besides audio, prompt and reference.
    """

    line: int
    audio: tuple[Path, ...]
    samples: tuple[int, ...]
    prompt: str
    reference: str
    columns: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The examples of a file, in its order, and the names of all columns that any of them has."""

    path: Path
    examples: tuple[Example, ...]
    columns: tuple[str, ...]


def read_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest: every line, and the header of every audio file.

    Raises:
        UserError: no such file, no examples, or unusable lines, the first ten of which are named with their faults.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such manifest; a JSON-lines file is needed.")
    rows, faults = {}, []
    for line, text in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not text.strip():
            continue
        row = _parse(text)
        found = [row] if isinstance(row, str) else list(_faults(row))
        faults.extend((line, fault) for fault in found)
        if not found:
            rows[line] = row
    audio = {line: _paths(row, path.parent) for line, row in rows.items()}
    headers = _read_headers({clip for clips in audio.values() for clip in clips})
    for line, clips in audio.items():
        faults.extend((line, headers[clip]) for clip in clips if isinstance(headers[clip], str))
    refuse(path, faults)
    if not rows:
        raise UserError(f"{path}: the manifest has no examples; one JSON object per line is needed.")
    examples = [
        Example(
            line=line,
            audio=audio[line],
            samples=tuple(headers[clip] for clip in audio[line]),
            prompt=row["prompt"],
            reference=row["reference"],
            columns={key: value for key, value in row.items() if key not in KEYS},
        )
        for line, row in rows.items()
    ]
    columns = dict.fromkeys(key for example in examples for key in example.columns)
    return Manifest(path=path, examples=tuple(examples), columns=tuple(columns))


def refuse(path: Path, faults: Iterable[tuple[int, str]]) -> None:
    """Raise one UserError that names the first ten (line number, fault) pairs, unless there are none."""
    faults = sorted(faults)
    if not faults:
        return
    shown = [f"  line {line}: {fault}" for line, fault in faults[:MAX_REPORTED]]
    rest = [f"  and {len(faults) - MAX_REPORTED} more"] if len(faults) > MAX_REPORTED else []
    count = len({line for line, _ in faults})
    raise UserError(
        "\n".join([f"{path}: {count} unusable line{'s' if count > 1 else ''}; correct or remove:", *shown, *rest])
    )


def _parse(text: bytes) -> dict[str, Any] | str:
    """Return the object on a line, or what is wrong with it."""
    try:
        row = json.loads(text)
    except ValueError as error:
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else f"a JSON object is needed, not {type(row).__name__}"


def _faults(row: dict[str, Any]) -> Iterator[str]:
    for key in ("prompt", "reference"):
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            yield f"{key!r} is {value!r}; a text is needed" if key in row else f"{key!r} is missing"
    clips = row.get("audio")
    if isinstance(clips, str):
        clips = [clips]
    if not (isinstance(clips, list) and clips and all(isinstance(clip, str) and clip for clip in clips)):
        yield f"'audio' is {clips!r}; a path or a list of paths is needed" if "audio" in row else "'audio' is missing"
    elif isinstance(row.get("prompt"), str) and row["prompt"].count(AUDIO_MARKER) != len(clips):
        yield (
            f"the prompt holds {row['prompt'].count(AUDIO_MARKER)} {AUDIO_MARKER} markers for "
            f"{len(clips)} audio files; one marker is needed per file"
        )
    for key in RESERVED:
        if key in row:
            yield f"{key!r} is reserved; give the column another name"


def _paths(row: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    clips = [row["audio"]] if isinstance(row["audio"], str) else row["audio"]
    return tuple(folder / clip for clip in clips)


def _read_headers(paths: set[Path]) -> dict[Path, int | str]:
    """Map each path to its length in samples, or to what is wrong with it."""

    def read(path: Path) -> int | str:
        try:
            return check_audio(path)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return dict(zip(paths, pool.map(read, paths), strict=True))
