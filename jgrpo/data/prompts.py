# SPDX-License-Identifier: Apache-2.0
"""What a task asks: prompt templates, and the column that holds the answer.

A template is a user message with `<|audio|>` for each clip and {column} for the text of a column. In training every
example takes one template, by a hash of what the example is: the same one in every epoch, run and order, on any number
of processes. In evaluation all take the first: scores are then comparable, and the paper's own prompt is the one that
is scored. It matters for translation, where models trained on speech recognition, too, are best told to translate by
the prompts that begin with the audio.
"""

import hashlib
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_port.errors import UserError
from model_port.processor import AUDIO_MARKER


@dataclass(frozen=True)
class Task:
    """What is asked about a data set, and which column answers it."""

    prompts: tuple[str, ...]
    reference: str


# The first of each is the paper's example, section 4.2, to the letter; it mentions more of them and gives none.
TASKS = {
    "librisqa_part1": Task(
        (
            "Listen to the audio <|audio|> and answer the following question:{question}",
            "<|audio|> Answer this question about what was said: {question}",
            "Here is a recording: <|audio|> Going by what the speaker says, {question}",
            "{question} The answer is in this recording: <|audio|>",
        ),
        "answer",
    ),
    "librisqa_part2": Task(
        (
            "Listen to the audio <|audio|> and answer the following question:{question}",
            "<|audio|> Which of the options is right, and why? {question}",
            "Here is a recording: <|audio|> Choose an option and give your reasons: {question}",
        ),
        "answer_and_analysis",
    ),
    "covost2": Task(
        (
            "<|audio|> listen to the speech and translate it into {language}.",
            "<|audio|> What does the speaker say? Answer in {language}.",
            "<|audio|> Give a {language} translation of this recording.",
            "<|audio|> Put what you hear into {language}.",
        ),
        "translation",
    ),
}


def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template names.

    Raises:
        UserError: braces that hold something else than the name of a column.
    """
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(
            f"prompt template {template!r}: {error}; a brace that names no column is written twice"
        ) from None
    for _, name, form, conversion in fields:
        if not name.isidentifier() or form or conversion:
            raise UserError(
                f"prompt template {template!r}: {{{name}}} is not the name of a column; write {{column}}, and a brace "
                "that names no column twice"
            )
    return tuple(dict.fromkeys(name for _, name, _, _ in fields))


def check_templates(templates: Sequence[str], columns: Sequence[str], clips: int) -> None:
    """Check templates against the columns that there are and the clips of an example.

    Raises:
        UserError: a column that does not exist, or another number of markers than of clips; it names the template.
    """
    for template in templates:
        if unknown := [name for name in template_columns(template) if name not in columns]:
            raise UserError(
                f"prompt template {template!r} names the column {unknown[0]!r}; there are "
                f"{', '.join(columns) or 'no columns'}"
            )
        if (markers := template.count(AUDIO_MARKER)) != clips:
            raise UserError(
                f"prompt template {template!r} holds {markers} {AUDIO_MARKER} markers and an example has {clips} "
                "clips; one marker is needed per clip"
            )


def choose(identity: str, count: int) -> int:
    """Return which of `count` templates an example takes; every process, now and later, chooses alike."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count


def ask(
    templates: Sequence[str], columns: Mapping[str, Sequence[Any]], identities: Sequence[str] | None, count: int
) -> tuple[list[str], list[tuple[int, str]]]:
    """Return the prompt of each of `count` examples, and the faults found as (example, what is wrong).

    Args:
        templates: checked by check_templates.
        identities: what each example is known by, to choose its template; None gives all of them the first.
    """
    names = [template_columns(template) for template in templates]
    known: dict[tuple, str] = {}  # a task without a column of its own has as many prompts as templates
    prompts, faults = [], []
    for i in range(count):
        chosen = 0 if identities is None or len(templates) == 1 else choose(identities[i], len(templates))
        values = tuple(columns[name][i] for name in names[chosen])
        found = list(_unusable(names[chosen], values))
        faults.extend((i, fault) for fault in found)
        key = (chosen, *values) if not found else None
        if key not in known:
            known[key] = "" if found else templates[chosen].format(**dict(zip(names[chosen], values, strict=True)))
        prompts.append(known[key])
    return prompts, faults


def _unusable(names: Sequence[str], values: Sequence[Any]) -> Iterator[str]:
    for name, value in zip(names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            yield f"the prompt needs {name!r}, which is {value!r}; a text is needed"
        elif isinstance(value, str) and AUDIO_MARKER in value:
            yield f"{name!r} holds {AUDIO_MARKER}, which stands for a clip; remove it"
