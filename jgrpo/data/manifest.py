# SPDX-License-Identifier: Apache-2.0
"""JSON-lines manifests: one training or evaluation example per line.

    {"audio": "clips/1.flac", "prompt": "<|audio|> translate the speech to German.", "reference": "Guten Tag."}

`audio` is a path relative to the manifest, or a list of paths with one `<|audio|>` marker in the prompt for each. Any
further key is a column, passed on to the reward functions. Where templates are given the prompts are made of those, and
where another column is named the references are its texts; the lines then need no key of that name.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jgrpo.data.examples import MAX_REPORTED, Examples, Files, clip_lengths, identities, one_store, refuse
from jgrpo.data.prompts import ask, check_templates
from model_port.audio import check_audio
from model_port.errors import UserError
from model_port.processor import AUDIO_MARKER

KEYS = ("audio", "prompt", "reference")
RESERVED = ("completions", "references")  # what a reward function is given besides the columns
HEADER_THREADS = 16  # headers are read at the speed of the file system's answers


def read_manifest(
    path: str | Path, *, prompts: Sequence[str] = (), reference: str = "", vary: bool = False
) -> Examples:
    """Read and check a manifest: every line, and the header of every audio file.

    Args:
        prompts: templates; without any, the key `prompt`.
        reference: column of the references; if empty, the key `reference`.
        vary: whether each example takes a template of its own, as in training, or all the first.

    Raises:
        UserError: no such file, no examples, unusable lines, the first ten of which are named with their faults, or
            templates and a column that do not belong to the manifest.
    """
    path = Path(path)
    rows, audio, samples = read_usable(path, needs=_needed(prompts, reference))
    lines = list(rows)
    names = dict.fromkeys(key for row in rows.values() for key in row if key not in KEYS)
    columns = {name: [row.get(name) for row in rows.values()] for name in names}
    references = [row.get("reference") for row in rows.values()]
    if reference and reference != "reference":
        references = _texts(path, lines, columns, reference)
    asked = [row["prompt"] for row in rows.values()] if not prompts else _ask(path, prompts, rows, columns, vary)
    return one_store(
        Files(str(path), audio),
        lines,
        samples,
        prompts=asked,
        references=references,
        columns=columns,
    )


def _ask(
    path: Path, templates: Sequence[str], rows: dict[int, dict[str, Any]], columns: dict[str, list[Any]], vary: bool
) -> list[str]:
    """Return the prompts that the templates make of the rows."""
    for count in sorted({len(clip_paths(row, path.parent)) for row in rows.values()}):
        check_templates(templates, tuple(columns), count)
    own = [json.dumps(row, sort_keys=True) for row in rows.values()]
    prompts, faults = ask(templates, columns, identities(columns, own) if vary else None, len(rows))
    lines = list(rows)
    refuse(path, [(lines[i], fault) for i, fault in faults])
    return prompts


def _needed(prompts: Sequence[str], reference: str) -> tuple[str, ...]:
    own = {"prompt": not prompts, "reference": reference in ("", "reference")}
    return tuple(key for key, needed in own.items() if needed)


def read_usable(
    path: Path, *, needs: Sequence[str], most: int | None = MAX_REPORTED
) -> tuple[dict[int, dict[str, Any]], dict[int, tuple[str, ...]], Int[np.ndarray, "N C"]]:
    """Return rows and the paths of their clips by line number, and the clips' lengths; every line must be usable.

    Args:
        needs: as for read_lines.
        most: unusable lines that are named; None for all.

    Raises:
        UserError: no such file, no examples, or unusable lines.
    """
    rows, faults = read_lines(path, needs=needs)
    audio = {line: clip_paths(row, path.parent) for line, row in rows.items()}
    headers = read_headers({clip for clips in audio.values() for clip in clips})
    for line, clips in audio.items():
        faults.extend((line, headers[clip]) for clip in clips if isinstance(headers[clip], str))
    refuse(path, faults, most=most)
    if not rows:
        raise UserError(f"{path}: the manifest has no examples; one JSON object per line is needed.")
    return rows, audio, clip_lengths([[headers[clip] for clip in clips] for clips in audio.values()])


def read_lines(
    path: Path, *, needs: Sequence[str] = ("prompt", "reference")
) -> tuple[dict[int, dict[str, Any]], list[tuple[int, str]]]:
    """Return the usable rows by line number, and every fault of the others as (line number, what is wrong).

    Args:
        needs: the keys besides `audio` that a row must have.

    Raises:
        UserError: no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such manifest; a JSON-lines file is needed, or PATH:SPLIT of a built data set.")
    rows, faults = {}, []
    for line, text in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not text.strip():
            continue
        row = _parse(text)
        found = [row] if isinstance(row, str) else list(_faults(row, needs))
        faults.extend((line, fault) for fault in found)
        if not found:
            rows[line] = row
    return rows, faults


def _parse(text: bytes) -> dict[str, Any] | str:
    """Return the object on a line, or what is wrong with it."""
    try:
        row = json.loads(text)
    except ValueError as error:
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else f"a JSON object is needed, not {type(row).__name__}"


def _faults(row: dict[str, Any], needs: Sequence[str]) -> Iterator[str]:
    for key in needs:
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            yield f"{key!r} is {value!r}; a text is needed" if key in row else f"{key!r} is missing"
    clips = row.get("audio")
    if isinstance(clips, str):
        clips = [clips]
    if not (isinstance(clips, list) and clips and all(isinstance(clip, str) and clip for clip in clips)):
        yield f"'audio' is {clips!r}; a path or a list of paths is needed" if "audio" in row else "'audio' is missing"
    elif "prompt" in needs and isinstance(row.get("prompt"), str) and row["prompt"].count(AUDIO_MARKER) != len(clips):
        yield (
            f"the prompt holds {row['prompt'].count(AUDIO_MARKER)} {AUDIO_MARKER} markers for "
            f"{len(clips)} audio files; one marker is needed per file"
        )
    for key in RESERVED:
        if key in row:
            yield f"{key!r} is reserved; give the column another name"


def _texts(path: Path, lines: list[int], columns: dict[str, list[Any]], name: str) -> list[str]:
    """Return a column that must hold texts."""
    if name not in columns:
        raise UserError(f"{path}: the references are to be {name!r}; there are {', '.join(columns) or 'no columns'}")
    faults = [
        (line, f"{name!r} is {value!r}; a text is needed")
        for line, value in zip(lines, columns[name], strict=True)
        if not isinstance(value, str) or not value.strip()
    ]
    refuse(path, faults)
    return columns[name]


def clip_paths(row: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Return the paths of a row's clips."""
    clips = [row["audio"]] if isinstance(row["audio"], str) else row["audio"]
    return tuple(str(folder / clip) for clip in clips)


def read_headers(paths: set[str]) -> dict[str, int | str]:
    """Map each path to its length in samples, or to what is wrong with it."""

    def read(path: str) -> int | str:
        try:
            return check_audio(path)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return dict(zip(paths, pool.map(read, paths), strict=True))
