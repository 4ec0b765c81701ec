# SPDX-License-Identifier: Apache-2.0
"""What a data set holds, as text: counts, lengths, what was dropped, and a few examples. No audio is decoded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from jgrpo.data.built import CARD, open_built, parse_split, read_built
from jgrpo.data.examples import Example, Examples, Files, one_store
from jgrpo.data.manifest import KEYS, read_lines, read_usable
from jgrpo.data.tokens import TokenRows
from model_port.config import ProjectorConfig
from model_port.features import SAMPLE_RATE, num_frames
from model_port.processor import Processor

PERCENTILES = (5, 50, 95, 99, 100)
BIN_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)  # widths of a histogram's bins
MAX_BINS = 12
BAR = 40  # characters
SHOWN = 160  # characters of a text


@dataclass(frozen=True, kw_only=True)
class Part:
    """Examples with what is known of them besides.

    Attributes:
        title: what is looked at.
        lacks: which of `prompt` and `reference` no line of a manifest has.
        drops: rows that the build dropped, by reason.
    """

    title: str
    examples: Examples
    lacks: tuple[str, ...] = ()
    drops: dict[str, int] | None = None


def inspect_data(path: str, *, model: str | None = None, records: int = 3) -> str:
    """Describe a manifest, a built data set or, as PATH:SPLIT, one split of it.

    Args:
        model: a model directory, whose tokenizer counts the tokens of prompts and references and whose projector
            those of the audio; without it, audio tokens are those of the published models.
        records: examples shown of each part.

    Raises:
        UserError: neither of those, or a manifest with unusable lines.
    """
    processor = None if model is None else Processor.from_pretrained(model)
    split = parse_split(path)
    if split is None and not Path(path).is_dir():
        return _describe(_read(Path(path)), processor, records)
    built = open_built(path if split is None else split["path"])
    facts = json.loads((built.directory / CARD).read_text(encoding="utf-8"))
    sections = [_about(built.directory, facts)]
    drops = facts["drops"]
    for name in list(built.splits) if split is None else [split["part"]]:
        examples = read_built(f"{built.directory}:{name}", vary=True)
        whole = name if split is None else split["split"]
        part = Part(title=f"{name}: {len(examples):,} records", examples=examples, drops=drops.get(whole, {}))
        sections.append(_describe(part, processor, records))
    if split is None:
        others = {name: found for name, found in drops.items() if name not in built.splits and found}
        sections += [f"{name}: no records\n  {_drops(found)}" for name, found in others.items()]
    return "\n\n".join(sections)


def check_manifest(path: str | Path) -> str:
    """Describe a manifest that can be used.

    Raises:
        UserError: no such file or no examples, or unusable lines, every one of them named with its number and faults.
    """
    return f"{_describe(_read(Path(path)), None, 0)}\n\nevery line can be used"


def _read(path: Path) -> Part:
    """Read a manifest, of which every line must be usable."""
    present = {key for row in read_lines(path, needs=())[0].values() for key in row} or KEYS
    needs = tuple(key for key in ("prompt", "reference") if key in present)
    rows, audio, samples = read_usable(path, needs=needs, most=None)
    names = dict.fromkeys(key for row in rows.values() for key in row if key not in KEYS)
    examples = one_store(
        Files(str(path), audio),
        list(rows),
        samples,
        prompts=[row.get("prompt", "") for row in rows.values()],
        references=[row.get("reference", "") for row in rows.values()],
        columns={name: [row.get(name) for row in rows.values()] for name in names},
    )
    lacks = tuple(key for key in ("prompt", "reference") if key not in needs)
    return Part(title=f"{path}: {len(rows):,} lines", examples=examples, lacks=lacks)


def _about(directory: Path, facts: dict[str, Any]) -> str:
    task, splits = facts["task"], facts["splits"].values()
    lines = [
        f"{directory}: {sum(split['records'] for split in splits):,} records, "
        f"{sum(split['hours'] for split in splits):,.2f} hours, "
        f"{'features and audio' if facts['features'] else 'audio'}",
        f"  references are {task['reference']!r}; language {facts['language']}; prompts",
        *(f"    {_shorten(template)}" for template in task["prompts"]),
        "  made from",
        *(f"    {key}: {_shorten(value)}" for key, value in facts["source"].items()),
    ]
    return "\n".join(lines)


def _describe(part: Part, processor: Processor | None, records: int) -> str:
    examples = part.examples
    clips = examples.samples[examples.samples > 0]
    lines = [f"{part.title}, {examples.seconds() / 3600:,.2f} hours"]
    if examples.samples.shape[1] > 1:
        lines.append(f"  {len(clips):,} clips, up to {examples.samples.shape[1]} in an example")
    lines += [f"  no line has {key!r}: a run needs {NEEDS[key]}" for key in part.lacks]
    if part.drops is not None:
        lines.append(f"  {_drops(part.drops)}")
    lines += ["", *_table(_lengths(part, processor)), "", *_histogram(clips)]
    for i in range(min(records, len(examples))):
        lines += ["", *_show(examples[i], examples.stores[0].unit, part.lacks)]
    return "\n".join(lines)


NEEDS = {"prompt": "prompt templates", "reference": "the name of the column that holds the references"}


def _drops(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    reasons = f": {', '.join(f'{count:,} {reason}' for reason, count in ordered)}" if counts else ""
    total = sum(counts.values())
    return f"{total:,} row{'' if total == 1 else 's'} dropped by the build{reasons}"


def _lengths(part: Part, processor: Processor | None) -> dict[str, Shaped[np.ndarray, " _"]]:
    """Return the lengths that there are, by name: those of clips, then those of examples."""
    samples = part.examples.samples
    clips = samples[samples > 0]
    slots = (processor or ProjectorConfig()).num_slots
    lengths = {
        "seconds": clips / SAMPLE_RATE,
        "stacked frames of 20 ms": _each(num_frames, clips),
        "audio tokens": np.where(samples > 0, _each(lambda count: slots(num_frames(count)), samples), 0).sum(axis=1),
    }
    if processor is not None and "prompt" not in part.lacks:
        prompts = TokenRows.of(part.examples.prompts, processor.encode_prompts)
        lengths["text tokens of the prompt"] = prompts.lengths(without=processor.audio_id)
    if processor is not None and "reference" not in part.lacks:
        references = TokenRows.of(part.examples.references, processor.encode_references)
        lengths["tokens of the reference"] = references.lengths()
    return lengths


def _each(function, values: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Apply a function of one number to all of an array."""
    distinct, where = np.unique(values, return_inverse=True)
    return np.array([function(value) for value in distinct.tolist()], np.int64)[where].reshape(values.shape)


def _table(lengths: dict[str, Shaped[np.ndarray, " _"]]) -> list[str]:
    """A row for each length: a percentile is the least value that so many per cent do not exceed."""
    names = [f"{percent} %" if percent < 100 else "most" for percent in PERCENTILES]
    lines = ["  " + " " * 26 + "".join(f"{name:>10}" for name in names)]
    for title, values in lengths.items():
        cells = np.percentile(values, PERCENTILES, method="inverted_cdf").tolist()
        form = ",.2f" if values.dtype.kind == "f" else ",d"
        lines.append(f"  {title:<26}" + "".join(f"{cell:>10{form}}" for cell in cells))
    return lines


def _histogram(clips: Int[np.ndarray, " _"]) -> list[str]:
    width = next((width for width in BIN_SECONDS if clips.max() < width * SAMPLE_RATE * MAX_BINS), BIN_SECONDS[-1])
    counts = np.bincount(clips // round(width * SAMPLE_RATE))
    digits = 1 if width < 1 else 0
    lines = ["  clips by seconds"]
    for k in range(int(counts.nonzero()[0][0]), len(counts)):
        count = int(counts[k])
        bar = "#" * -(-count * BAR // int(counts.max()))
        lines.append(f"  {k * width:>6.{digits}f} - {(k + 1) * width:<6.{digits}f} {count:>10,} {bar}".rstrip())
    return lines


def _show(example: Example, unit: str, lacks: tuple[str, ...]) -> list[str]:
    clips = zip(example.audio, example.samples, strict=True)
    texts = {"prompt": example.prompt, "reference": example.reference}
    known = [None, *example.audio, example.reference]  # a record is called by its id
    columns = {key: value for key, value in example.columns.items() if value not in known}
    shown = {key: text for key, text in texts.items() if key not in lacks} | columns
    return [
        f"  {unit} {example.row}: {', '.join(f'{name}, {count / SAMPLE_RATE:.2f} s' for name, count in clips)}",
        *(f"    {key}: {_shorten(value)}" for key, value in shown.items()),
    ]


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters)"
