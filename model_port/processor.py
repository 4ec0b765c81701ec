# SPDX-License-Identifier: Apache-2.0
"""Prompts and audio to a Batch, tokens back to text: chat template, `<|audio|>` expansion, padding.

Source: transformers GraniteSpeechProcessor, whose token ids these are. What differs: features are computed clip by
clip, prompts are left-aligned, and the day on which a prompt is made is always PROMPT_DATE.
"""

import datetime
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float

from model_port import features as front_end
from model_port.audio import load_audio
from model_port.batch import Batch, Completions
from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.paths import as_path, small_files_at_hand

AUDIO_MARKER = "<|audio|>"
# The system turn of Granite 3.3's template holds the day's date. Here it is that of the model card's system prompt, so
# that a prompt is the same tomorrow, in every process and in a run that goes on.
PROMPT_DATE = datetime.date(2025, 4, 9)
# transformers gives templates today's date by a function of this name, and takes none in its place.
DATE_MACRO = (
    "{%- macro strftime_now(format) %}"
    "{{ prompt_dates[format] if format in prompt_dates else raise_exception('it asks for the date in another form') }}"
    "{%- endmacro %}{{ '' }}"
)
PLACEHOLDER = "a system message to be cut out"
# What the files of a model directory may say about features, under the names that transformers uses.
FRONT_END_SETTINGS = {
    "sampling_rate": front_end.SAMPLE_RATE,
    "sample_rate": front_end.SAMPLE_RATE,
    "n_fft": front_end.FFT_SIZE,
    "win_length": front_end.WINDOW,
    "hop_length": front_end.HOP,
    "n_mels": front_end.NUM_MELS,
}


class Processor:
    """The tokenizer, chat template and front end of one model directory.

    Attributes:
        audio_id: id of `<|audio|>`, which stands once per audio embedding.
        eos_ids: ids that end a completion; the first is the tokenizer's and ends training targets.
        pad_id: id put where there is no token. It may equal an end id: only masks tell padding.
    """

    def __init__(self, tokenizer, config: GraniteSpeechConfig, *, template: str | None = None):
        """Take a transformers tokenizer; `template` (Jinja) replaces its chat template.

        Raises:
            UserError: no chat template, or a tokenizer that is not this model's.
        """
        self._tokenizer = tokenizer
        template = template or tokenizer.chat_template
        self._projector = config.projector
        if not template:
            raise UserError(
                "the tokenizer has no chat template: put chat_template.jinja into the model directory, or pass "
                "template=\"{{ messages[-1]['content'] }}\" to use messages as they are."
            )
        forms = [form for _, form in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template)]
        self._dates = {form: PROMPT_DATE.strftime(form) for form in forms}
        self._template = DATE_MACRO + template if "strftime_now" in template else template
        self.audio_id = tokenizer.convert_tokens_to_ids(AUDIO_MARKER)
        if self.audio_id != config.audio_token_id:
            raise UserError(
                f"the tokenizer maps {AUDIO_MARKER} to {self.audio_id} and config.json has "
                f"audio_token_index {config.audio_token_id}; use the tokenizer files of the same model."
            )
        ends = (tokenizer.eos_token_id, *config.eos_token_ids)
        self.eos_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
        self.pad_id = config.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._gap = "" if self._prompt_ends_open() else " "

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, template: str | None = None) -> "Processor":
        """Read a Hugging Face or an Orbax model directory: both hold config.json and the tokenizer files.

        Raises:
            UserError: a missing file, or settings of another front end or tokenizer.
        """
        if not (as_path(path) / "config.json").is_file():
            raise UserError(f"{path} is not a model directory: it has no config.json.")
        with small_files_at_hand(path) as directory:
            return cls._read(directory, template)

    @classmethod
    def _read(cls, path: Path, template: str | None) -> "Processor":
        _check_front_end(path)
        config = GraniteSpeechConfig.from_hf(json.loads((path / "config.json").read_text()))
        try:
            tokenizer = _auto_tokenizer().from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot load the tokenizer; are all its files there? {error}") from error
        older = path / "chat_template.json"
        if not (template or tokenizer.chat_template) and older.is_file():
            template = json.loads(older.read_text())["chat_template"]
        try:
            return cls(tokenizer, config, template=template)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def __call__(
        self,
        audio: Sequence[Any],
        prompts: Sequence[str],
        *,
        system: str | None = None,
        audio_frames: int | None = None,
        prompt_tokens: int | None = None,
    ) -> Batch:
        """Return a Batch of NumPy arrays for user messages and their clips.

        Args:
            audio: 1-D floating-point waveforms at 16 kHz, or paths of audio files. The k-th clip belongs to the k-th
                `<|audio|>` marker, counted through the prompts in order.
            prompts: user messages; the chat template goes around them here.
            system: system message of all prompts. None leaves it to the template, which may have one of its own, and
                "" leaves the system turn out.
            audio_frames, prompt_tokens: A and L to pad to; default the longest in the batch.

        Raises:
            UserError: unusable audio, another number of markers than of clips, or something longer than its padding.
        """
        if isinstance(prompts, str) or isinstance(audio, (str, Path)):
            raise UserError("audio and prompts are lists: one user message per row and one clip per marker.")
        tokens = self.encode_prompts(prompts, system=system)
        counts = [row.count(self.audio_id) for row in tokens]
        if sum(counts) != len(audio):
            raise UserError(
                f"the prompts hold {sum(counts)} {AUDIO_MARKER} markers ({', '.join(map(str, counts))} by row) and "
                f"{len(audio)} clips were given; one marker is needed per clip."
            )
        clips = iter([_features(clip, k) for k, clip in enumerate(audio)])
        rows = [[next(clips) for _ in range(count)] for count in counts]
        return self.collate(tokens, rows, audio_frames=audio_frames, prompt_tokens=prompt_tokens)

    def encode_prompts(self, prompts: Sequence[str], *, system: str | None = None) -> list[list[int]]:
        """Return each user message's tokens inside the chat template, one audio token per marker.

        Special tokens are recognised wherever they stand, in user messages too, as in transformers.
        """
        distinct = list(dict.fromkeys(prompts))
        rows = self._encode([self._wrap(prompt, system) for prompt in distinct])
        ids = dict(zip(distinct, rows, strict=True))
        return [ids[prompt] for prompt in prompts]

    def encode_reference(self, text: str) -> list[int]:
        """Return the tokens of `text` as the completion of a prompt, up to and including the end token.

        One space goes in front unless the prompt ends in whitespace or in a special token: `ASSISTANT:` is followed
        by " text", `<|end_of_role|>` by "text". A text that begins with whitespace stays as it is.

        Raises:
            UserError: the text holds an end token or an audio marker.
        """
        return self.encode_references([text])[0]

    def encode_references(self, texts: Sequence[str]) -> list[list[int]]:
        """Do encode_reference for many texts at once."""
        spaced = [self._gap + text if text and not text[0].isspace() else text for text in texts]
        rows = self._encode(spaced)
        for text, row in zip(texts, rows, strict=True):
            if found := {self.audio_id, *self.eos_ids} & set(row):
                names = ", ".join(self._tokenizer.convert_ids_to_tokens(sorted(found)))
                raise UserError(f"the reference {text!r} contains {names}, which has a meaning of its own; remove it.")
        return [[*row, self.eos_ids[0]] for row in rows]

    def decode(self, completions: Completions) -> list[list[str]]:
        """Return P lists of G texts: the tokens under the mask, without end tokens and other special tokens.

        Nothing else is removed: not the leading space of a model that answers after `ASSISTANT:`, not spaces before
        punctuation (transformers' clean_up_tokenization_spaces is off, whatever the tokenizer's setting).
        """
        tokens, mask = np.asarray(completions.tokens), np.asarray(completions.mask)
        return [
            [self._decode(row[keep]) for row, keep in zip(group, keeps, strict=True)]
            for group, keeps in zip(tokens, mask, strict=True)
        ]

    def num_slots(self, frames: int) -> int:
        """Audio embeddings of a clip of `frames` stacked frames."""
        return self._projector.num_slots(frames)

    def collate(
        self,
        tokens: Sequence[Sequence[int]],
        clips: Sequence[Sequence[Float[np.ndarray, "_ M"]]],
        *,
        audio_frames: int | None = None,
        prompt_tokens: int | None = None,
        num_clips: int | None = None,
    ) -> Batch:
        """Pad rows of encode_prompts tokens and their clips' features to a Batch.

        Args:
            tokens: P rows with one audio token per clip.
            clips: P lists of features, in the order of the markers.
            audio_frames, prompt_tokens, num_clips: A, L and C to pad to; default the largest in the batch.

        Raises:
            UserError: a row that does not fit. Nothing is ever truncated.
        """
        lengths = [[len(clip) for clip in row] for row in clips]
        A = _padded("audio frames", audio_frames, [max(row, default=0) for row in lengths])
        # C is 0 for a batch without any clip: that is how a model knows to leave the adapter off.
        C = _padded("clips", num_clips, [len(row) for row in lengths], least=0)
        rows = [self._expand(row, n, self.num_slots(A)) for row, n in zip(tokens, lengths, strict=True)]
        L = _padded("prompt tokens, audio included,", prompt_tokens, [len(ids) for ids, _ in rows])
        P = len(rows)
        batch = {
            "tokens": np.full((P, L), self.pad_id, np.int32),
            "mask": np.zeros((P, L), bool),
            "audio_slots": np.full((P, L), -1, np.int32),
            "features": np.zeros((P, C, A, front_end.NUM_FEATURES), np.float32),
            "lengths": np.zeros((P, C), np.int32),
        }
        for p, (ids, slots) in enumerate(rows):
            batch["tokens"][p, : len(ids)] = ids
            batch["mask"][p, : len(ids)] = True
            batch["audio_slots"][p, : len(ids)] = slots
            batch["lengths"][p, : len(lengths[p])] = lengths[p]
            for c, clip in enumerate(clips[p]):
                batch["features"][p, c, : len(clip)] = clip
        return Batch(**batch)

    def _expand(self, row: Sequence[int], lengths: Sequence[int], stride: int) -> tuple[list[int], list[int]]:
        """Repeat each audio token once per embedding of its clip; clip c's embeddings start at slot c * stride."""
        assert row.count(self.audio_id) == len(lengths), f"{row.count(self.audio_id)} markers, {len(lengths)} clips"
        ids, slots, c = [], [], 0
        for token in row:
            if token != self.audio_id:
                ids.append(token)
                slots.append(-1)
                continue
            count = self.num_slots(lengths[c])
            ids.extend([token] * count)
            slots.extend(range(c * stride, c * stride + count))
            c += 1
        return ids, slots

    def _wrap(self, prompt: str, system: str | None) -> str:
        """Put the chat template around a user message, up to where the assistant speaks."""
        user = {"role": "user", "content": prompt}
        if system is None:
            return self._render([user])
        if system == "":
            if self._default_system is None:
                return self._render([user])
            message, turn = self._default_system
            return self._render([message, user]).removeprefix(turn)
        text = self._render([{"role": "system", "content": system}, user])
        if system.strip() not in text:
            raise UserError("this model's chat template has no place for a system message; leave it out.")
        return text

    @functools.cached_property
    def _default_system(self) -> tuple[dict[str, str], str] | None:
        """A system message and the turn it becomes, where the template makes one for a conversation that has none.

        Such a template is given this message instead, whose turn can be cut off; others say nothing by themselves.
        """
        system, user = {"role": "system", "content": PLACEHOLDER}, {"role": "user", "content": "a user message"}
        alone = self._render([user])
        try:
            whole = self._render([system, user])
        except UserError:
            return None
        if PLACEHOLDER not in whole or _is_inserted(alone, whole):
            return None
        # It ends where the user's begins, and as the user's ends: what a template makes of a system message alone
        # would tell as well, but it may refuse a conversation without a user.
        ended = self._render([system, user], add_generation_prompt=False)
        head, _, rest = ended.partition(PLACEHOLDER)
        end = ended.partition(user["content"])[2]
        if not end or not rest.startswith(end) or user["content"] in head:
            raise UserError(
                "this chat template does not put the system message in a turn of its own at the start, so a prompt "
                'without one (system="") cannot be made; pass a system message or another template.'
            )
        return system, head + PLACEHOLDER + end

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                prompt_dates=self._dates,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template fails on the roles ({roles}): {error}") from error

    def _prompt_ends_open(self) -> bool:
        """Whether text may follow a prompt directly: it ends in whitespace or in a special token."""
        text = self._wrap("a user message", None)
        return text[-1:].isspace() or self._encode([text])[0][-1] in self._tokenizer.all_special_ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids and nothing added: the template holds all special tokens of a prompt."""
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _decode(self, tokens: np.ndarray) -> str:
        ids = [token for token in tokens.tolist() if token not in self.eos_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _is_inserted(text: str, longer: str) -> bool:
    """Whether `longer` is `text` with something put in at one place."""
    before = len(os.path.commonprefix([text, longer]))
    after = len(os.path.commonprefix([text[::-1], longer[::-1]]))
    return before + after >= len(text)


def _features(clip, index: int) -> Float[np.ndarray, "A M"]:
    try:
        return front_end.log_mel(load_audio(clip) if isinstance(clip, (str, Path)) else clip)
    except UserError as error:
        raise UserError(f"clip {index}: {error}") from error


def _padded(what: str, size: int | None, needed: list[int], *, least: int = 1) -> int:
    """Return `size`, or the largest need, at least `least`; raise if a row needs more than `size`."""
    if size is None:
        return max([*needed, least])
    for row, need in enumerate(needed):
        if need > size:
            raise UserError(f"row {row} has {need} {what} and the batch is padded to {size}; nothing is truncated.")
    return size


def _check_front_end(path: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (path / name).is_file():
            continue
        for key, value in _settings(json.loads((path / name).read_text())):
            if key in FRONT_END_SETTINGS and value != FRONT_END_SETTINGS[key]:
                raise UserError(f"{path / name} sets {key} to {value}; only {FRONT_END_SETTINGS[key]} is supported.")


def _settings(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All settings of nested sections: releases differ in how deep they put them."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _settings(value)
        else:
            yield key, value


def _auto_tokenizer():
    """Import transformers here, where it is needed, and without its remark that no model framework is installed."""
    logger = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return "Models won't be available" not in record.getMessage()

    logger.addFilter(keep)
    try:
        from transformers import AutoTokenizer
    finally:
        logger.removeFilter(keep)
    return AutoTokenizer
