"""Audio files to waveforms: 16 kHz, one channel, float32. Formats: wav, flac, mp3, ogg (Vorbis and Opus)."""

from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from model_port.errors import UserError
from model_port.features import MIN_SAMPLES, SAMPLE_RATE


def check_audio(path: str | Path) -> int:
    """Return the number of 16 kHz samples that load_audio will give, from the header alone.

    Only an mp3 file whose header does not state a length is decoded.

    Raises:
        UserError: no such file, not a readable audio file, or less than 257 samples (16 ms) of sound.
    """
    info = _header(path)
    frames = info.frames if _states_length(path, info) else len(_decode(path))
    return _checked_length(path, frames, info.samplerate)


def load_audio(path: str | Path) -> Float[np.ndarray, " n"]:
    """Return the file's sound at 16 kHz, channels averaged, full scale 1.

    Raises:
        UserError: as check_audio does, or the sound ends before the length in the header (a truncated file).
    """
    info = _header(path)
    wave = _decode(path)
    if _states_length(path, info) and len(wave) != info.frames:
        raise UserError(
            f"{path}: the header promises {info.frames} samples and {len(wave)} could be decoded; "
            "the file is damaged: restore or drop it."
        )
    _checked_length(path, len(wave), info.samplerate)
    mono = wave.mean(axis=1)
    return mono if info.samplerate == SAMPLE_RATE else soxr.resample(mono, info.samplerate, SAMPLE_RATE)


def _header(path: str | Path):
    if not Path(path).is_file():
        raise UserError(f"{path}: no such audio file.")
    try:
        return soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise UserError(
            f"{path}: not a readable audio file ({error.error_string}); wav, flac, mp3, ogg and opus are supported."
        ) from error


def _decode(path: str | Path) -> Float[np.ndarray, "n channels"]:
    try:
        return soundfile.read(str(path), dtype="float32", always_2d=True)[0]
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path}: cannot decode the audio ({error.error_string}); restore or drop the file.") from error


def _states_length(path: str | Path, info) -> bool:
    """Whether the header's length is exact: an mp3 file without a length tag gets a guess from its first bit rate."""
    if info.format != "MP3":
        return True
    with open(path, "rb") as file:
        start = file.read(10)
        if start[:3] == b"ID3":  # its size is four bytes of seven bits
            file.seek(10 + sum(byte << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True)))
        else:
            file.seek(0)
        first_frame = file.read(4096)
    return any(tag in first_frame for tag in (b"Xing", b"Info", b"VBRI"))


def _checked_length(path: str | Path, frames: int, rate: int) -> int:
    samples = (2 * frames * SAMPLE_RATE + rate) // (2 * rate)  # rounded half up, as soxr does
    if samples < MIN_SAMPLES:
        raise UserError(
            f"{path}: {frames} samples at {rate} Hz are too short; "
            f"at least {MIN_SAMPLES / SAMPLE_RATE * 1000:.0f} ms of audio are needed."
        )
    return samples
