# SPDX-License-Identifier: Apache-2.0
"""What of a data set is trained on: examples are tokenized, and those that are not wanted or do not fit are named.

Nothing is shortened: a clip or a prompt that is cut no longer says what its reference answers.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from jgrpo.data.examples import Examples, refuse
from jgrpo.data.tokens import TokenRows
from model_port.errors import UserError
from model_port.features import HOP, MIN_SAMPLES, SAMPLE_RATE, STACK, num_frames
from model_port.paths import as_path, write_whole
from model_port.processor import Processor

FRAME_SECONDS = STACK * HOP / SAMPLE_RATE  # 20 ms per stacked frame


@dataclass(frozen=True)
class Limits:
    """What examples are kept.

    Attributes:
        buckets: stacked frames that clips are padded to, rising.
        max_prompt_tokens: of a prompt's text.
        completion_tokens: that a reference, with its end token, may have; None where references are not trained on.
        min_seconds, max_seconds, max_reference_tokens: examples beyond are left out; None leaves out none.
        unfit: what is done about examples that do not fit the first three: refuse the data set, or drop them.
    """

    buckets: tuple[int, ...]
    max_prompt_tokens: int
    completion_tokens: int | None = None
    min_seconds: float = 0.0
    max_seconds: float | None = None
    max_reference_tokens: int | None = None
    unfit: Literal["refuse", "drop"] = "refuse"


@dataclass(frozen=True)
class Drop:
    """An example that is left out; `reason` is one of few, `detail` is about this one."""

    data: str
    unit: str
    row: int
    id: Any
    reason: str
    detail: str


@dataclass
class Fitted:
    """The examples of a data set that are kept, tokenized, and those that are not."""

    examples: Examples
    prompts: TokenRows
    references: TokenRows | None
    drops: list[Drop] = field(default_factory=list)

    def leave_out(self, bad: Bool[np.ndarray, " N"], reason: str, detail: Callable[[int], str]) -> None:
        """Drop the examples that are `bad`."""
        if not bad.any():
            return
        examples = self.examples
        store, ids = examples.stores[0], examples.columns.get("id")
        for i in np.flatnonzero(bad).tolist():
            own = None if ids is None else ids[i]
            self.drops.append(Drop(store.name, store.unit, int(examples.rows[i]), own, reason, detail(i)))
        kept = np.flatnonzero(~bad)
        self.examples = examples.take(kept)
        self.prompts = self.prompts.take(kept)
        self.references = None if self.references is None else self.references.take(kept)
        if not len(kept):
            counts = summary(self.drops)
            raise UserError(f"{store.name}: every example is dropped ({counts}); change those limits or the data")


def fit(examples: Examples, processor: Processor, limits: Limits, *, system: str | None = None) -> Fitted:
    """Tokenize the examples of one data set and keep those within the limits.

    Raises:
        UserError: examples that do not fit where those are refused, references that cannot be one, or nothing is left.
    """
    found = Fitted(examples, _no_rows(len(examples)), None)
    shortest = _shortest(found.examples.samples)
    _filter_seconds(found, shortest / SAMPLE_RATE < limits.min_seconds, f"shorter than {limits.min_seconds:g} s")
    if limits.max_seconds is not None:
        longest = found.examples.samples.max(axis=1)
        _filter_seconds(found, longest / SAMPLE_RATE > limits.max_seconds, f"longer than {limits.max_seconds:g} s")
    _fit_audio(found, limits)
    found.prompts = TokenRows.of(found.examples.prompts, lambda texts: processor.encode_prompts(texts, system=system))
    counts, most = found.prompts.lengths(without=processor.audio_id), limits.max_prompt_tokens
    _unfit(
        found,
        limits,
        counts > most,
        f"prompt above {most} text tokens",
        lambda i: f"the prompt has {counts[i]} text tokens; max_prompt_tokens is {most}",
    )
    if limits.completion_tokens is not None or limits.max_reference_tokens is not None:
        _fit_references(found, processor, limits)
    return found


def _no_rows(count: int) -> TokenRows:
    return TokenRows(np.empty(0, np.int32), np.zeros(1, np.int64), np.zeros(count, np.int32))


def _shortest(samples: Int[np.ndarray, "N C"]) -> Int[np.ndarray, " N"]:
    """Return the length of each example's shortest clip; a 0 is no clip."""
    return np.where(samples == 0, np.iinfo(np.int32).max, samples).min(axis=1)


def _filter_seconds(found: Fitted, bad: Bool[np.ndarray, " N"], reason: str) -> None:
    samples = found.examples.samples
    found.leave_out(bad, reason, lambda i: "; ".join(f"{n / SAMPLE_RATE:.2f} s" for n in samples[i] if n))


def _fit_audio(found: Fitted, limits: Limits) -> None:
    examples, limit = found.examples, limits.buckets[-1]
    bound = f"the longest audio bucket holds {limit * FRAME_SECONDS:.2f} s"

    def detail(i: int) -> str:
        example = examples[i]
        clips = zip(example.audio, example.samples, strict=True)
        long = [f"{name} lasts {n / SAMPLE_RATE:.2f} s" for name, n in clips if num_frames(n) > limit]
        return f"{' and '.join(long)} and {bound}; add a longer bucket"

    reason = f"longer than the longest bucket, {limit * FRAME_SECONDS:g} s"
    _unfit(found, limits, clip_frames(examples.samples) > limit, reason, detail)


def clip_frames(samples: Int[np.ndarray, "N C"]) -> Int[np.ndarray, " N"]:
    """Return the stacked frames of each example's longest clip, as num_frames counts them."""
    return (samples.max(axis=1) // HOP + 1) // STACK


def _fit_references(found: Fitted, processor: Processor, limits: Limits) -> None:
    try:
        found.references = TokenRows.of(found.examples.references, processor.encode_references)
    except UserError:
        store = found.examples.stores[0]
        refuse(store.name, _unusable_references(found.examples, processor), unit=store.unit)
        raise
    if (most := limits.max_reference_tokens) is not None:
        counts = found.references.lengths()
        found.leave_out(counts > most, f"reference above {most} tokens", lambda i: f"{counts[i]} tokens")
    if (room := limits.completion_tokens) is None:
        found.references = None
        return
    lengths = found.references.lengths()
    _unfit(
        found,
        limits,
        lengths > room,
        f"reference above the {room} tokens of a completion",
        lambda i: f"the reference has {lengths[i]} tokens with its end token; completions hold {room}",
    )


def _unusable_references(examples: Examples, processor: Processor) -> Iterable[tuple[int, str]]:
    for row, reference in zip(examples.rows.tolist(), examples.references, strict=True):
        try:
            processor.encode_reference(reference)
        except UserError as error:
            yield row, str(error)


def _unfit(
    found: Fitted, limits: Limits, bad: Bool[np.ndarray, " N"], reason: str, detail: Callable[[int], str]
) -> None:
    if limits.unfit == "drop":
        found.leave_out(bad, reason, detail)
        return
    examples, store = found.examples, found.examples.stores[0]
    faults = [(int(examples.rows[i]), detail(i)) for i in np.flatnonzero(bad).tolist()]
    refuse(store.name, faults, unit=store.unit, remedy=", or set data.unfit to drop for training")


def bucket_frames(seconds: Sequence[float]) -> tuple[int, ...]:
    """Return the stacked frames of each bucket; a clip of exactly that many seconds fits.

    Raises:
        UserError: no bucket, or lengths that do not rise from the shortest clip there can be.
    """
    samples = [round(length * SAMPLE_RATE) for length in seconds]
    if not samples or samples[0] < MIN_SAMPLES or samples != sorted(set(samples)):
        raise UserError(f"the audio buckets are {tuple(seconds)} seconds; clip lengths in increasing order are needed.")
    return tuple(num_frames(count) for count in samples)


def summary(drops: Sequence[Drop]) -> str:
    """Return the reasons with their counts, the commonest first."""
    counts = Counter(drop.reason for drop in drops)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def write_drops(drops: Sequence[Drop], path: str | os.PathLike) -> None:
    """Write one JSON object per dropped example, or remove the file of an earlier start where there are none."""
    if not drops:
        as_path(path).unlink(missing_ok=True)
        return
    lines = [
        {"data": drop.data, drop.unit: drop.row, "id": drop.id, "reason": drop.reason, "detail": drop.detail}
        for drop in drops
    ]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
