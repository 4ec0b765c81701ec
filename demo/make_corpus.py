# ruff: noqa: T201 (a program that talks to a person)
"""Speak the demo's sentences with espeak-ng and write the manifests.

    python -m demo.make_corpus --set all

Needs espeak-ng on the PATH. Two runs with the same versions of espeak-ng, soxr, libsndfile and libopus write the same
bytes, audio included: every draw comes from a generator seeded by what it is for, and the serial number that
libsndfile draws for each Ogg stream is replaced. With other versions the manifests stay the same but for `duration`.

    OUT/audio/SPLIT/NNNNN.opus, OUT/SPLIT.jsonl       train, val, test, test_voices: translation, target style
    OUT/qa_{train,val,test}.jsonl                     questions about the same clips, target style
    OUT/build/pre/NNNNN.opus, OUT/build/pre.jsonl     what the base model is made from: mixed tasks, base style
    OUT/build/ctc.jsonl                               the same clips, for the character recogniser
"""

import argparse
import io
import json
import os
import random
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr

from demo.sentences import (
    ASR_PROMPT,
    AST_PROMPT,
    BASE_STYLE,
    QA_PROMPT,
    QUESTIONS,
    TARGET_STYLE,
    Sentence,
    Style,
    answer,
    draw_splits,
    plain,
    questions_for,
    transcript,
    translate,
)

SEED = 2024
SAMPLE_RATE = 16_000
PEAK = 0.5
# The demo pads every clip to this length, so a longer one is spoken again with another voice, speed and pitch.
MAX_SECONDS = 3.0
# Sentences are drawn in this order, so a split must never be moved or resized alone.
SIZES = {"pre": 5000, "train": 1500, "val": 200, "test": 200, "test_voices": 200}
VOICES = ("en-us", "en-us+m3", "en-us+f2", "en-us+f4", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029")
HELD_OUT_VOICES = ("en-us+f5", "en-gb-x-gbcwmd")
QUESTION_SPLITS = ("train", "val", "test")
TASKS_PER_CLIP = 3
TASK_WEIGHTS = {"ast": 0.6, "asr": 0.2, "qa": 0.2}


@dataclass(frozen=True)
class Clip:
    """A spoken sentence on disk; `seconds` is the length that the file decodes to."""

    id: str
    path: Path
    sentence: Sentence
    voice: str
    seconds: float


def audio_folder(out: Path, split: str) -> Path:
    """Where the clips of a split lie; the large pre-training set is built, not committed."""
    return out / "build" / "pre" if split == "pre" else out / "audio" / split


def speak(text: str, voice: str, *, speed: int, pitch: int) -> np.ndarray:
    """Synthesise mono float32 speech at 16 kHz with a peak of 0.5. `speed` is in words per minute, `pitch` 0 to 99."""
    command = ["espeak-ng", "-z", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    spoken = subprocess.run(command, check=True, capture_output=True).stdout
    # espeak-ng cannot seek in a pipe and leaves a wrong length in the header: 44 bytes, then mono 16-bit samples.
    rate = struct.unpack_from("<I", spoken, 24)[0]
    samples = np.frombuffer(spoken[44:], "<i2").astype(np.float32)
    wave = soxr.resample(samples, rate, SAMPLE_RATE)
    return wave * (PEAK / np.abs(wave).max())


def encode(wave: np.ndarray, serial: int) -> bytes:
    """Code as Ogg/Opus at the highest compression, as a stream with this serial number."""
    file = io.BytesIO()
    soundfile.write(file, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=1.0)
    return with_serial(file.getvalue(), serial)


def with_serial(stream: bytes, serial: int) -> bytes:
    """Give every page of an Ogg stream this serial number and the checksum that goes with it. Source: RFC 3533 §6."""
    data = bytearray(stream)
    start = 0
    while start < len(data):
        segments = data[start + 26]
        end = start + 27 + segments + sum(data[start + 27 : start + 27 + segments])
        struct.pack_into("<I", data, start + 14, serial)
        struct.pack_into("<I", data, start + 22, 0)
        struct.pack_into("<I", data, start + 22, ogg_checksum(data[start:end]))
        start = end
    return bytes(data)


def ogg_checksum(page: bytes) -> int:
    """CRC-32 with generator 0x04c11db7, most significant bit first, from 0. Source: RFC 3533 §6."""
    crc = 0
    for byte in page:
        crc = (crc << 8) & 0xFFFFFFFF ^ CRC_TABLE[crc >> 24 ^ byte]
    return crc


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << 24
        for _ in range(8):
            crc = crc << 1 ^ (0x104C11DB7 if crc & 0x80000000 else 0)
        table.append(crc)
    return table


CRC_TABLE = _crc_table()


def make_clip(index: int, sentence: Sentence, *, split: str, folder: Path) -> Clip:
    """Speak one sentence into its file, with a voice, speed and pitch drawn for this clip alone."""
    rng = random.Random(f"{SEED} speech {split} {index}")
    voices = HELD_OUT_VOICES if split == "test_voices" else VOICES
    while True:
        voice = rng.choice(voices)
        wave = speak(transcript(sentence), voice, speed=rng.randint(200, 260), pitch=rng.randint(35, 65))
        if len(wave) <= MAX_SECONDS * SAMPLE_RATE:
            break
    path = folder / f"{index:05d}.opus"
    path.write_bytes(encode(wave, serial=index))
    decoded = soundfile.info(path)
    return Clip(f"{split}-{index:05d}", path, sentence, voice, decoded.frames / decoded.samplerate)


def make_clips(split: str, sentences: list[Sentence], *, out: Path, processes: int) -> list[Clip]:
    """Speak all sentences of a split."""
    folder = audio_folder(out, split)
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes) as pool:
        one = partial(make_clip, split=split, folder=folder)
        return list(pool.map(one, range(len(sentences)), sentences, chunksize=50))


def line(clip: Clip, task: str, *, style: Style, rng: random.Random, base: Path) -> dict:
    """One manifest line: the clip with a prompt and a reference drawn for this task ("ast", "asr" or "qa")."""
    if task == "ast":
        prompt, reference = AST_PROMPT, translate(clip.sentence, style, rng)
    elif task == "asr":
        prompt, reference = ASR_PROMPT, transcript(clip.sentence)
    else:
        kind = rng.choice(questions_for(clip.sentence))
        prompt = QA_PROMPT.format(question=QUESTIONS[kind])
        reference = answer(clip.sentence, kind, style, rng)
    return {
        "id": clip.id,
        "audio": clip.path.relative_to(base).as_posix(),
        "prompt": prompt,
        "reference": reference,
        "transcript": transcript(clip.sentence),
        "speaker": clip.voice,
        "task": task,
        "duration": round(clip.seconds, 3),
    }


def mixed_lines(clips: list[Clip], rng: random.Random, *, base: Path) -> Iterator[dict]:
    """Several lines per clip, each with a task drawn by TASK_WEIGHTS, in the base style; the id gets a letter."""
    for clip in clips:
        for letter in "abcdefgh"[:TASKS_PER_CLIP]:
            task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
            drawn = line(clip, task, style=BASE_STYLE, rng=rng, base=base)
            yield drawn | {"id": f"{clip.id}{letter}"}


def character_lines(clips: list[Clip], *, base: Path) -> Iterator[dict]:
    """The transcript in the recogniser's alphabet, a to z and space."""
    for clip in clips:
        drawn = line(clip, "asr", style=BASE_STYLE, rng=random.Random(SEED), base=base)
        yield drawn | {"reference": plain(drawn["transcript"])}


def target_lines(clips: list[Clip], task: str, *, split: str, base: Path) -> Iterator[dict]:
    """One line per clip, in the target style."""
    rng = random.Random(f"{SEED} {task} {split}")
    for clip in clips:
        yield line(clip, task, style=TARGET_STYLE, rng=rng, base=base)


def write_manifest(path: Path, lines: Iterator[dict]) -> None:
    """Write JSON lines and print what the manifest holds."""
    lines = list(lines)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
    tasks = " ".join(f"{task} {count}" for task, count in sorted(Counter(row["task"] for row in lines).items()))
    print(f"{path}: {len(lines)} lines ({tasks})")


def make_set(split: str, sentences: list[Sentence], *, out: Path, processes: int) -> None:
    """Write the audio and the manifests of one split."""
    clips = make_clips(split, sentences, out=out, processes=processes)
    seconds = sum(clip.seconds for clip in clips)
    size = sum(clip.path.stat().st_size for clip in clips)
    longest = max(clip.seconds for clip in clips)
    print(f"{split}: {len(clips)} clips, {seconds / 3600:.2f} h, longest {longest:.2f} s, {size / 1e6:.2f} MB")
    if split == "pre":
        base = out / "build"
        write_manifest(base / "pre.jsonl", mixed_lines(clips, random.Random(f"{SEED} mixed {split}"), base=base))
        write_manifest(base / "ctc.jsonl", character_lines(clips, base=base))
        return
    write_manifest(out / f"{split}.jsonl", target_lines(clips, "ast", split=split, base=out))
    if split in QUESTION_SPLITS:
        write_manifest(out / f"qa_{split}.jsonl", target_lines(clips, "qa", split=split, base=out))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Synthesise the demo corpus.")
    parser.add_argument("--set", choices=[*SIZES, "all"], default="all", help="which split to make")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="processes that speak")
    args = parser.parse_args()
    for split, sentences in draw_splits(SIZES, SEED).items():
        if args.set in (split, "all"):
            make_set(split, sentences, out=args.out, processes=args.processes)


if __name__ == "__main__":
    main()
