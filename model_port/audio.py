# SPDX-License-Identifier: Apache-2.0
"""Audio files to waveforms: 16 kHz, one channel, float32. Formats: wav, flac, mp3, ogg (Vorbis and Opus).

A file is given as its path or as its bytes; both are decoded by the same calls and give the same samples.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from model_port.errors import UserError
from model_port.features import MIN_SAMPLES, SAMPLE_RATE

Fault = Literal["missing", "empty", "unsupported", "undecodable", "truncated", "too short"]


class AudioError(UserError):
    """A clip that cannot be used.

    Attributes:
        kind: why, for those who count such clips. "empty" is no bytes or no samples; "unsupported" is no sound file
            or a format that is not supported; "undecodable" is one that fails in the middle; "truncated" is one that
            ends before the length in its header.
    """

    def __init__(self, message: str, kind: Fault):
        super().__init__(message)
        self.kind: Fault = kind

    def __reduce__(self):
        return type(self), (str(self), self.kind)  # it travels between processes


def check_audio(source: str | Path | bytes, name: str | None = None) -> int:
    """Return the number of 16 kHz samples that load_audio will give. Nothing is decoded.

    Args:
        source: the path of a file, or the bytes of one.
        name: what messages call the clip; by default the path.

    Raises:
        AudioError: missing, empty, unsupported, or less than 257 samples (16 ms) of sound.
    """
    name = _name(source, name)
    with _open(source, name) as sound:
        return _checked_length(name, sound.frames, sound.samplerate)


def load_audio(source: str | Path | bytes, name: str | None = None) -> Float[np.ndarray, " n"]:
    """Return the sound at 16 kHz, channels averaged, full scale 1.

    Raises:
        AudioError: as check_audio does, or undecodable or truncated.
    """
    name = _name(source, name)
    with _open(source, name) as sound:
        frames, rate = sound.frames, sound.samplerate
        try:
            wave = sound.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            message = f"{name}: cannot decode the audio ({error.error_string}); restore or drop the file."
            raise AudioError(message, "undecodable") from error
    if len(wave) != frames:
        raise AudioError(
            f"{name}: the header promises {frames} samples and {len(wave)} could be decoded; "
            "the file is damaged: restore or drop it.",
            "truncated",
        )
    _checked_length(name, frames, rate)
    mono = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE)


def _name(source: str | Path | bytes, name: str | None) -> str:
    return name or (f"audio of {len(source)} bytes" if isinstance(source, bytes) else str(source))


@contextlib.contextmanager
def _open(source: str | Path | bytes, name: str) -> Iterator[soundfile.SoundFile]:
    """Open the sound, with its exact number of frames."""
    with _file(source, name) as file, contextlib.ExitStack() as stack:
        start = file.read(1)
        if not start:
            raise AudioError(f"{name}: not a readable audio file: it is empty; restore or drop it.", "empty")
        file.seek(0)
        try:
            # A descriptor where there is one: for any other file libsndfile calls back into Python for every block,
            # and threads that decode wait for one another.
            sound = stack.enter_context(
                soundfile.SoundFile(file if isinstance(file, io.BytesIO) else file.fileno(), closefd=False)
            )
            if sound.format == "MP3" and not _states_length(file):
                file.seek(0)
                sound = stack.enter_context(soundfile.SoundFile(_Endless(file.read())))
        except soundfile.LibsndfileError as error:
            message = (
                f"{name}: not a readable audio file ({error.error_string}); wav, flac, mp3, ogg and opus are supported."
            )
            raise AudioError(message, "unsupported") from error
        yield sound


def _file(source: str | Path | bytes, name: str) -> io.IOBase:
    """Open the encoded file; bytes become a file in memory with a descriptor, where the system has such files."""
    if isinstance(source, bytes):
        if not hasattr(os, "memfd_create"):
            return io.BytesIO(source)
        file = open(os.memfd_create("audio"), "w+b", buffering=0)
        file.write(source)
        file.seek(0)
        return file
    if not Path(source).is_file():
        raise AudioError(f"{name}: no such audio file.", "missing")
    try:
        return open(source, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{name}: cannot be opened ({error.strerror}).") from error


class _Endless(io.BytesIO):
    """The bytes of a file that claims to have no known end.

    Where an mp3 file does not state its length, libsndfile multiplies the size of its first frame and decodes no
    further; of a file without an end it counts the frames.
    """

    _claims = False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._claims = whence == os.SEEK_END and offset == 0
        return super().seek(offset, whence)

    def tell(self) -> int:
        return 2**63 - 1 if self._claims else super().tell()


def _states_length(file: io.IOBase) -> bool:
    """Whether an mp3 file has a length tag, which stands in its first frame."""
    position = file.tell()  # the decoder's too, which reads on from there
    file.seek(0)
    start = file.read(10)
    if start[:3] == b"ID3":  # its size is four bytes of seven bits
        file.seek(10 + sum(byte << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True)))
    else:
        file.seek(0)
    first_frame = file.read(4096)
    file.seek(position)
    return any(tag in first_frame for tag in (b"Xing", b"Info", b"VBRI"))


def _checked_length(name: str, frames: int, rate: int) -> int:
    samples = (2 * frames * SAMPLE_RATE + rate) // (2 * rate)  # rounded half up, as soxr does
    if samples < MIN_SAMPLES:
        raise AudioError(
            f"{name}: {frames} samples at {rate} Hz are too short; "
            f"at least {MIN_SAMPLES / SAMPLE_RATE * 1000:.0f} ms of audio are needed.",
            "too short" if frames else "empty",
        )
    return samples
