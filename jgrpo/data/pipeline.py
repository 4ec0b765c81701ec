"""Manifest examples to padded batches, in grain worker threads.

The order is fixed before anything is loaded: batch s of a stream is a pure function of (seed, s), on any number of
processes, so a run resumes from the step number alone. Batches are padded to one of a few shapes, known at the start
from the audio headers and the tokenized texts; whatever fits none of them is refused then, not during training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Float, Int

from jgrpo.data.manifest import Manifest, refuse
from model_port.audio import load_audio
from model_port.batch import Batch
from model_port.errors import UserError
from model_port.features import HOP, MIN_SAMPLES, SAMPLE_RATE, STACK, log_mel, num_frames
from model_port.processor import Processor

# Few batches ahead: an element here is a whole batch, and grain's default would load 500 of them.
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
FRAME_SECONDS = STACK * HOP / SAMPLE_RATE  # 20 ms per stacked frame
TEXT_STEP = 8  # text tokens; the padding for text is a multiple of it, so that manifests of one task share a shape


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """This process's P prompts of one step.

    Attributes:
        indices: which examples of the manifest the rows are.
        columns: a list of P values for each column of the manifest; None where a line lacks it.
        valid: rows that count; those after them repeat others to fill the last batch of an evaluation.
        reference_tokens: the reference as a completion, end token included, padded with the pad id; None unless
            completion_tokens was given.
        reference_mask: true up to and including the end token.
    """

    batch: Batch
    indices: Int[np.ndarray, " P"]
    prompts: list[str]
    references: list[str]
    columns: dict[str, list[Any]]
    valid: int
    reference_tokens: Int[np.ndarray, "P 1 T"] | None = None
    reference_mask: Bool[np.ndarray, "P 1 T"] | None = None


class PromptStream:
    """An endless iterator over PromptBatch whose whole state is the number of batches taken."""

    def __init__(self, dataset: grain.MapDataset, start_step: int):
        self._iterator = iter(dataset.to_iter_dataset(READ_OPTIONS))
        self.set_state({"next_index": start_step})

    def __iter__(self) -> "PromptStream":
        return self

    def __next__(self) -> PromptBatch:
        return next(self._iterator)

    def state(self) -> dict[str, int]:
        """Return {"next_index": the step whose batch comes next}."""
        return {"next_index": self._iterator.get_state()["next_index"]}

    def set_state(self, state: dict[str, int]) -> None:
        """Go to the batch of step `next_index`."""
        self._iterator.set_state(state)


class PromptData:
    """The examples of a manifest, tokenized, as training streams and evaluation epochs."""

    def __init__(
        self,
        manifest: Manifest,
        processor: Processor,
        *,
        prompts_per_step: int,
        audio_buckets_seconds: tuple[float, ...] = (10.0, 20.0, 40.0),
        max_prompt_tokens: int = 256,
        completion_tokens: int | None = None,
        system: str | None = None,
        cache: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Tokenize all prompts and check that every example fits; no audio is decoded yet.

        Args:
            prompts_per_step: P over all processes; each of them takes a contiguous slice.
            audio_buckets_seconds: the clip lengths batches are padded to.
            max_prompt_tokens: limit for a prompt's text, chat template included. Audio embeddings do not count: they
                alone may exceed the paper's prompt length of 256.
            completion_tokens: T of reference_tokens; None leaves them out.
            system: system message of all prompts.
            cache: keep features in memory (about 32 kB per second of audio) instead of computing them every epoch.

        Raises:
            UserError: examples that do not fit, by line, or rows that do not divide over the processes.
        """
        if prompts_per_step < 1 or prompts_per_step % process_count:
            raise UserError(
                f"prompts_per_step is {prompts_per_step} and there are {process_count} processes; "
                f"a positive multiple of {process_count} is needed."
            )
        self.manifest = manifest
        self._processor = processor
        self._global_rows = prompts_per_step
        local = prompts_per_step // process_count
        self._rows = slice(process_index * local, (process_index + 1) * local)
        self._frames = np.array([max(map(num_frames, example.samples)) for example in manifest.examples])
        self._buckets = _bucket_frames(audio_buckets_seconds)
        self._refuse_long_audio()
        self._prompts = processor.encode_prompts([example.prompt for example in manifest.examples], system=system)
        self._num_clips = max(len(example.audio) for example in manifest.examples)
        self._text_tokens = self._text_padding(max_prompt_tokens)
        self._completion_tokens = completion_tokens
        self._references = None if completion_tokens is None else self._encode_references(completion_tokens)
        self._cache: dict[int, list[np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        """Examples in the manifest."""
        return len(self.manifest.examples)

    def shapes(self) -> list[tuple[int, int]]:
        """Return every (A, L) that a batch can have: one compilation each."""
        needed = sorted({self._bucket(frames) for frames in set(self._frames.tolist())})
        return [(bucket, self._prompt_tokens(bucket)) for bucket in needed]

    def stream(self, *, seed: int, start_step: int = 0) -> PromptStream:
        """Return the endless training stream: reshuffled every epoch, batches crossing from one into the next."""
        order = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat().batch(self._global_rows)
        return PromptStream(order.map(lambda rows: self._load(rows, self._global_rows)), start_step)

    def further(self, *, seed: int, index: int) -> PromptBatch:
        """Return batch `index` of a stream in an order of its own, for prompts beside those of `stream`."""
        own = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
        order = grain.MapDataset.range(len(self)).shuffle(seed=own).repeat().batch(self._global_rows)
        return self._load(order[index], self._global_rows)

    def gather(self, indices: Int[np.ndarray, " N"]) -> PromptBatch:
        """Return these examples as the batch of a step, in the order given: the indices of all processes' rows."""
        return self._load(indices, len(indices))

    def epoch(self) -> Iterator[PromptBatch]:
        """Return all examples once, in order; the last batch repeats some of its rows to keep its shape."""
        size = self._global_rows

        def load(step: int) -> PromptBatch:
            rows = np.arange(step * size, min((step + 1) * size, len(self)))
            return self._load(np.resize(rows, size), len(rows))

        return iter(grain.MapDataset.range(-(-len(self) // size)).map(load).to_iter_dataset(READ_OPTIONS))

    def _load(self, rows: Int[np.ndarray, " N"], valid: int) -> PromptBatch:
        """Make this process's part of the batch of examples `rows`; all processes choose the shape of the whole."""
        bucket = self._bucket(self._frames[rows].max())
        indices = rows[self._rows]
        examples = [self.manifest.examples[i] for i in indices]
        return PromptBatch(
            batch=self._processor.collate(
                [self._prompts[i] for i in indices],
                [self._features(i) for i in indices.tolist()],
                audio_frames=bucket,
                prompt_tokens=self._prompt_tokens(bucket),
                num_clips=self._num_clips,
            ),
            indices=indices,
            prompts=[example.prompt for example in examples],
            references=[example.reference for example in examples],
            columns={name: [example.columns.get(name) for example in examples] for name in self.manifest.columns},
            valid=min(max(valid - self._rows.start, 0), len(indices)),
            **self._reference_arrays(indices),
        )

    def _features(self, index: int) -> list[Float[np.ndarray, "_ M"]]:
        """Decode the clips of an example; their lengths must be those that the shapes were planned with."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        example = self.manifest.examples[index]
        clips = []
        for path, samples in zip(example.audio, example.samples, strict=True):
            wave = load_audio(path)
            if len(wave) != samples:
                raise UserError(
                    f"{path} had {samples} samples when the run started and has {len(wave)} now; "
                    "audio files must not change during a run."
                )
            try:
                clips.append(log_mel(wave))
            except UserError as error:
                raise UserError(f"{path} (line {example.line} of {self.manifest.path}): {error}") from error
        if self._cache is not None:
            self._cache[index] = clips
        return clips

    def _bucket(self, frames: int | np.integer) -> int:
        """The smallest padded clip length that holds `frames` stacked frames."""
        return next(bucket for bucket in self._buckets if bucket >= frames)

    def _prompt_tokens(self, bucket: int) -> int:
        """L: embeddings of all clips at the padded length, and the padding for text."""
        return self._num_clips * self._processor.num_slots(bucket) + self._text_tokens

    def _refuse_long_audio(self) -> None:
        limit = self._buckets[-1]
        refuse(
            self.manifest.path,
            [
                (
                    example.line,
                    f"{path} lasts {samples / SAMPLE_RATE:.2f} s and the longest audio bucket holds "
                    f"{limit * FRAME_SECONDS:.2f} s; add a longer bucket",
                )
                for example in self.manifest.examples
                for path, samples in zip(example.audio, example.samples, strict=True)
                if num_frames(samples) > limit
            ],
        )

    def _text_padding(self, limit: int) -> int:
        """Text tokens to pad for: the longest prompt's, rounded up, within the limit that none may exceed."""
        audio_id = self._processor.audio_id
        counts = [len(row) - row.count(audio_id) for row in self._prompts]
        faults = [
            (example.line, f"the prompt has {count} text tokens; max_prompt_tokens is {limit}")
            for example, count in zip(self.manifest.examples, counts, strict=True)
            if count > limit
        ]
        refuse(self.manifest.path, faults)
        return min(limit, -(-max(counts) // TEXT_STEP) * TEXT_STEP)

    def _encode_references(self, limit: int) -> list[list[int]]:
        examples = self.manifest.examples
        try:
            rows = self._processor.encode_references([example.reference for example in examples])
        except UserError:
            refuse(self.manifest.path, self._unusable_references())
            raise
        faults = [
            (example.line, f"the reference has {len(row)} tokens with its end token; completions hold {limit}")
            for example, row in zip(examples, rows, strict=True)
            if len(row) > limit
        ]
        refuse(self.manifest.path, faults)
        return rows

    def _unusable_references(self) -> Iterator[tuple[int, str]]:
        for example in self.manifest.examples:
            try:
                self._processor.encode_reference(example.reference)
            except UserError as error:
                yield example.line, str(error)

    def _reference_arrays(self, indices: Int[np.ndarray, " P"]) -> dict[str, np.ndarray]:
        if self._references is None:
            return {}
        shape = (len(indices), 1, self._completion_tokens)
        tokens, mask = np.full(shape, self._processor.pad_id, np.int32), np.zeros(shape, bool)
        for p, index in enumerate(indices):
            row = self._references[index]
            tokens[p, 0, : len(row)] = row
            mask[p, 0, : len(row)] = True
        return {"reference_tokens": tokens, "reference_mask": mask}


def _bucket_frames(seconds: tuple[float, ...]) -> list[int]:
    """Stacked frames of each bucket; a clip of exactly that many seconds fits."""
    samples = [round(length * SAMPLE_RATE) for length in seconds]
    if not samples or samples[0] < MIN_SAMPLES or samples != sorted(set(samples)):
        raise UserError(f"the audio buckets are {tuple(seconds)} seconds; clip lengths in increasing order are needed.")
    return [num_frames(count) for count in samples]
