# SPDX-License-Identifier: Apache-2.0
"""Examples to padded batches, in grain worker threads.

The order is fixed before anything is loaded: batch s of a stream is a pure function of (seed, s), on any number of
processes, so a run resumes from the step number alone. Batches are padded to one of a few shapes, known at the start
from the lengths of the clips and the tokenized texts; whatever fits none of them is named then, not during training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int

from jgrpo.data.clips import ClipReader, Features
from jgrpo.data.examples import Examples, join
from jgrpo.data.fit import Drop, Limits, bucket_frames, clip_frames, fit
from jgrpo.data.mixture import Order, Source
from jgrpo.data.tokens import join_rows
from model_port.batch import Batch
from model_port.errors import UserError
from model_port.processor import Processor

# Few batches ahead: an element here is a whole batch, and grain's default would load 500 of them.
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
TEXT_STEP = 8  # text tokens; the padding for text is a multiple of it, so that data sets of one task share a shape
STEPS = 1 << 40  # of a stream, which has no end
# Purposes folded into a seed: what stands in for a clip that cannot be read, and the order of batches in a window.
SUBSTITUTES, GROUPED = 3, 4


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """This process's P prompts of one step.

    Attributes:
        indices: which examples of the data the rows are.
        columns: a list of P values for each column of the data; None where an example lacks it.
        reference_tokens: the reference as a completion, end token included, padded with the pad id; None unless
            completion_tokens was given.
        reference_mask: true up to and including the end token.
        sources: which source of a mixture the rows are of; None where there is no mixture.
        source_names: of all sources of the mixture.
        skipped: what could not be read, and what took its place.
    """

    batch: Batch
    indices: Int[np.ndarray, " P"]
    references: list[str]
    columns: dict[str, list[Any]]
    reference_tokens: Int[np.ndarray, "P 1 T"] | None = None
    reference_mask: Bool[np.ndarray, "P 1 T"] | None = None
    sources: Int[np.ndarray, " P"] | None = None
    source_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def _from_step(dataset: grain.MapDataset, start_step: int, skipped: list[str]) -> Iterator[PromptBatch]:
    """Give the batches from a step on; what one skipped is told when it is taken, however early it was loaded."""
    iterator = iter(dataset.to_iter_dataset(READ_OPTIONS))
    iterator.set_state({"next_index": start_step})
    for batch in iterator:
        skipped.extend(batch.skipped)
        yield batch


class PromptData:
    """Examples, tokenized, as training streams and evaluation epochs.

    Attributes:
        examples: those that are used, those of all sources.
        drops: those that are not, of each source.
        sources: names of the sources of a mixture; empty where there is none.
        counts, seconds: examples in use, and their audio, of each source.
    """

    def __init__(
        self,
        data: Examples | Sequence[Source],
        processor: Processor,
        *,
        prompts_per_step: int,
        audio_buckets_seconds: Sequence[float] = (10.0, 20.0, 40.0),
        max_prompt_tokens: int = 256,
        completion_tokens: int | None = None,
        system: str | None = None,
        cache: bool = False,
        max_unreadable: int = 0,
        length_window: int = 1,
        rows: Sequence[int] | np.ndarray | None = None,
        **filters: Any,
    ):
        """Tokenize all prompts and settle which examples are used; no audio is decoded yet.

        Args:
            data: the examples, or the sources of a mixture.
            prompts_per_step: P over all processes.
            audio_buckets_seconds: the clip lengths batches are padded to.
            max_prompt_tokens: limit for a prompt's text, chat template included. Audio embeddings do not count: they
                alone may exceed the paper's prompt length of 256.
            completion_tokens: T of reference_tokens; None leaves them out.
            system: system message of all prompts.
            cache: keep features in memory (about 32 kB per second of audio) instead of computing them every epoch.
            max_unreadable: examples that training goes on without when their audio cannot be read.
            length_window: batches of a stream over which clips of like length are put together; 1 leaves them as drawn.
            rows: which of the P this process holds, rising; None for all.
            filters: further fields of jgrpo.data.fit.Limits.

        Raises:
            UserError: examples that do not fit, by line.
        """
        if prompts_per_step < 1:
            raise UserError(f"prompts_per_step is {prompts_per_step}; a positive number is needed.")
        parts = [Source(data)] if isinstance(data, Examples) else list(data)
        self._processor = processor
        self._global_rows = prompts_per_step
        self._rows = np.arange(prompts_per_step) if rows is None else np.asarray(rows)
        self._buckets = bucket_frames(audio_buckets_seconds)
        limits = Limits(self._buckets, max_prompt_tokens, completion_tokens, **filters)
        fitted = [fit(part.examples, processor, limits, system=system) for part in parts]
        self.examples = join([one.examples for one in fitted])
        self.drops: tuple[list[Drop], ...] = tuple(one.drops for one in fitted)
        self.sources = () if isinstance(data, Examples) else tuple(part.name for part in parts)
        self.counts = tuple(len(one.examples) for one in fitted)
        self.seconds = tuple(one.examples.seconds() for one in fitted)
        self._weights = [part.weight for part in parts]
        self._source = np.repeat(np.arange(len(parts)), self.counts)
        self._prompts = join_rows([one.prompts for one in fitted])
        self._completion_tokens = completion_tokens
        self._references = None if completion_tokens is None else join_rows([one.references for one in fitted])
        self._frames = clip_frames(self.examples.samples)
        longest = int(self._prompts.lengths(without=processor.audio_id).max())
        self._text_tokens = min(max_prompt_tokens, -(-longest // TEXT_STEP) * TEXT_STEP)
        self._num_clips = int((self.examples.samples > 0).sum(axis=1).max())
        self._clips = ClipReader(self.examples, cache=cache, max_unreadable=max_unreadable)
        self._length_window = length_window
        self._skipped: list[str] = []

    def __len__(self) -> int:
        """Examples in use."""
        return len(self.examples)

    @property
    def name(self) -> str:
        """What the data was read from."""
        return self.examples.name

    def source_of(self, index: int) -> str:
        """Return the name of the source of a mixture that an example is of."""
        return self.sources[self._source[index]]

    def shapes(self) -> list[tuple[int, int]]:
        """Return every (A, L) that a batch can have: one compilation each."""
        needed = sorted({self._bucket(frames) for frames in set(self._frames.tolist())})
        return [(bucket, self._prompt_tokens(bucket)) for bucket in needed]

    def stream(self, *, seed: int, start_step: int = 0) -> Iterator[PromptBatch]:
        """Return the endless training stream: reshuffled every epoch, batches crossing from one into the next."""
        order = Order(self.counts, self._weights, seed=seed)
        steps = grain.MapDataset.range(STEPS).map(lambda step: self._draw(order, step, seed))
        return _from_step(steps, start_step, self._skipped)

    def further(self, *, seed: int, index: int) -> PromptBatch:
        """Return batch `index` of a stream in an order of its own, for prompts beside those of `stream`."""
        order = Order(self.counts, self._weights, seed=seed, further=True)
        batch = self._draw(order, index, seed, 1)
        self._skipped.extend(batch.skipped)
        return batch

    def gather(self, indices: Int[np.ndarray, " N"]) -> PromptBatch:
        """Return these examples as the batch of a step, in the order given: the indices of all processes' rows."""
        return self._load(indices)

    def epoch(self) -> Iterator[PromptBatch]:
        """Return all examples once, in order; the last batch repeats some of its rows to keep its shape.

        Raises:
            UserError: an example that cannot be read: what is computed over an epoch is about all of them.
        """
        size = self._global_rows

        def load(step: int) -> PromptBatch:
            rows = np.arange(step * size, min((step + 1) * size, len(self)))
            return self._load(np.resize(rows, size))

        return iter(grain.MapDataset.range(-(-len(self) // size)).map(load).to_iter_dataset(READ_OPTIONS))

    def take_skipped(self) -> list[str]:
        """Return what training had to go on without since the last call: one message per row of a batch."""
        skipped, self._skipped[:] = list(self._skipped), []
        return skipped

    def _draw(self, order: Order, step: int, seed: int, *purpose: int) -> PromptBatch:
        """Make this process's part of a batch in some order, with substitutes for what cannot be read."""
        rows, key = self._grouped(order, step, seed, *purpose), (seed, SUBSTITUTES, step, *purpose)
        indices, clips, skipped = [], [], []
        for row in self._rows.tolist():
            index, found = int(rows[row]), self._clips.attempt(int(rows[row]))
            if isinstance(found, str):
                index, features = self._substitute(rows, row, key)
                asked, taken = self.examples.where(int(rows[row])), self.examples.where(index)
                skipped.append(f"{asked} cannot be read, and {taken} takes its place: {found}")
                found = features
            indices.append(index)
            clips.append(found)
        # The shape is that of the examples that were drawn: every process knows those.
        bucket = self._bucket(self._frames[rows].max())
        return self._batch(np.array(indices), clips, bucket, skipped=tuple(skipped))

    def _grouped(self, order: Order, step: int, seed: int, *purpose: int) -> Int[np.ndarray, " N"]:
        """Return the examples of a batch: those of a window of batches stand together by their buckets.

        So that one long clip does not set the shape of all. A window holds the examples that it would anyway, and where
        one of them is in it twice, as at the turn of an epoch, they stay as drawn, lest both come into one batch.
        """
        size, window = self._global_rows, self._length_window
        number, place = divmod(step, window)
        rows = order(range(number * window * size, (number + 1) * window * size)).reshape(window, size)
        kinds = np.searchsorted(self._buckets, self._frames[rows.reshape(-1)])
        if window == 1 or kinds.min() == kinds.max() or len(np.unique(rows)) < rows.size:
            return rows[place]
        together = rows.reshape(-1)[np.argsort(kinds, kind="stable")].reshape(window, size)
        return together[np.random.default_rng([seed, GROUPED, number, *purpose]).permutation(window)[place]]

    def _substitute(self, rows: Int[np.ndarray, " N"], row: int, key: tuple[int, ...]) -> tuple[int, Features]:
        """Return another example of the same source that fits into the batch and can be read, with its features.

        It depends on the batch and the row alone: not on the process that holds the row, nor on what was read before.
        """
        source, bucket = self._source[rows[row]], self._bucket(self._frames[rows].max())
        fits = np.flatnonzero((self._source == source) & (self._frames <= bucket))
        fits = np.random.default_rng([*key, row]).permutation(fits)
        here = np.isin(fits, rows)
        for other in [
            *fits[~here].tolist(),
            *fits[here].tolist(),
        ]:  # one that is in the batch only if there is no other
            if not isinstance(found := self._clips.attempt(other), str):
                return other, found
        raise UserError(f"nothing can be read that fits in the place of {self.examples.where(int(rows[row]))}")

    def _load(self, rows: Int[np.ndarray, " N"]) -> PromptBatch:
        """Make this process's part of the batch of examples `rows`; all processes choose the shape of the whole."""
        indices = rows[self._rows]
        clips = [self._read(index) for index in indices.tolist()]
        return self._batch(indices, clips, self._bucket(self._frames[rows].max()))

    def _read(self, index: int) -> Features:
        try:
            return self._clips.read(index)
        except UserError as error:
            raise UserError(
                f"{error}\n{self.examples.where(index)} is needed: nothing can take its place here. Restore its audio, "
                "or remove it from the data."
            ) from error

    def _batch(
        self,
        indices: Int[np.ndarray, " P"],
        clips: list[Features],
        bucket: int,
        skipped: tuple[str, ...] = (),
    ) -> PromptBatch:
        examples, chosen = self.examples, indices.tolist()
        return PromptBatch(
            batch=self._processor.collate(
                [self._prompts[i].tolist() for i in chosen],
                clips,
                audio_frames=bucket,
                prompt_tokens=self._prompt_tokens(bucket),
                num_clips=self._num_clips,
            ),
            indices=indices,
            references=[examples.references[i] for i in chosen],
            columns={name: [values[i] for i in chosen] for name, values in examples.columns.items()},
            sources=self._source[indices] if self.sources else None,
            source_names=self.sources,
            skipped=skipped,
            **self._reference_arrays(indices),
        )

    def _bucket(self, frames: int | np.integer) -> int:
        """The smallest padded clip length that holds `frames` stacked frames."""
        return next(bucket for bucket in self._buckets if bucket >= frames)

    def _prompt_tokens(self, bucket: int) -> int:
        """L: embeddings of all clips at the padded length, and the padding for text."""
        return self._num_clips * self._processor.num_slots(bucket) + self._text_tokens

    def _reference_arrays(self, indices: Int[np.ndarray, " P"]) -> dict[str, np.ndarray]:
        if self._references is None:
            return {}
        shape = (len(indices), 1, self._completion_tokens)
        tokens, mask = np.full(shape, self._processor.pad_id, np.int32), np.zeros(shape, bool)
        for p, index in enumerate(indices.tolist()):
            row = self._references[index]
            tokens[p, 0, : len(row)] = row
            mask[p, 0, : len(row)] = True
        return {"reference_tokens": tokens, "reference_mask": mask}
