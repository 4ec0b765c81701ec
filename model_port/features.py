# SPDX-License-Identifier: Apache-2.0
"""The log-mel front end of Granite Speech, in NumPy, one clip at a time.

A clip is never padded together with others: zeros after its end would replace the reflection there and change its
last frames. Padding is added to finished features (model_port.processor).

Source: transformers GraniteSpeechFeatureExtractor, which runs torchaudio's MelSpectrogram.
"""

import functools

import numpy as np
from jaxtyping import Float

from model_port.errors import UserError

SAMPLE_RATE = 16_000  # Hz
HOP = 160  # samples: 10 ms, 100 mel frames a second
WINDOW = 400  # samples: 25 ms of Hann window, centred in the transform
FFT_SIZE = 512  # samples: 257 frequency bins, 31.25 Hz apart
REFLECT = FFT_SIZE // 2  # samples mirrored at each end, so that frame t is centred on sample t * HOP
NUM_MELS = 80  # triangular filters from 0 to 8000 Hz
STACK = 2  # mel frames in a stacked frame: 20 ms, 50 stacked frames a second
NUM_FEATURES = NUM_MELS * STACK
MIN_SAMPLES = REFLECT + 1  # a reflection of n samples needs n + 1
POWER_FLOOR = 1e-10  # before the logarithm
DYNAMIC_RANGE = 8.0  # decades kept below the loudest value of the clip
# Frames transformed at once. Their arrays of half a megabyte stay in the cache of a core; with fewer frames, clips that
# are transformed in several threads wait for the interpreter after every short operation.
BLOCK_FRAMES = 128
FILTER_GROUPS = 8  # filters applied at once are 80 / 8 neighbours, over the few bins where they are not zero


def num_frames(samples: int) -> int:
    """Stacked frames of a clip: centred frames number samples // HOP + 1, and an odd last one is dropped."""
    return (samples // HOP + 1) // STACK


def log_mel(wave: np.ndarray) -> Float[np.ndarray, "A M"]:
    """Return the features of one clip.

    Args:
        wave: 1-D floating-point samples at 16 kHz, full scale 1.

    Returns:
        float32 [num_frames(len(wave)), 160]: two neighbouring mel frames side by side, about -1.5 (silence) to 2.

    Raises:
        UserError: not a 1-D floating-point array, fewer than 257 samples, or NaN or infinite samples.
    """
    wave = check_wave(wave)
    mel = _mel_power(wave)
    np.log10(np.maximum(mel, POWER_FLOOR, out=mel), out=mel)
    np.maximum(mel, mel.max() - DYNAMIC_RANGE, out=mel)
    mel /= 4.0
    mel += 1.0
    return mel[: num_frames(len(wave)) * STACK].reshape(-1, NUM_FEATURES).astype(np.float32)


def check_wave(wave: np.ndarray) -> Float[np.ndarray, " n"]:
    """Return `wave` as float32, or raise the UserError that log_mel promises."""
    wave = np.asarray(wave)
    if not np.issubdtype(wave.dtype, np.floating):
        raise UserError(
            f"audio has dtype {wave.dtype}; floating-point samples between -1 and 1 are needed. "
            "Divide 16-bit samples by 32768."
        )
    if wave.ndim != 1:
        raise UserError(f"audio has shape {wave.shape}; one channel is needed, shape [samples]. Average the channels.")
    if len(wave) < MIN_SAMPLES:
        raise UserError(f"audio has {len(wave)} samples; at least {MIN_SAMPLES} (16 ms at 16 kHz) are needed.")
    if not np.isfinite(wave).all():
        raise UserError("audio contains NaN or infinite samples; repair or drop the clip.")
    return wave.astype(np.float32, copy=False)


def _mel_power(wave: Float[np.ndarray, " n"]) -> Float[np.ndarray, "frames mels"]:
    """Power in each mel filter for all len(wave) // HOP + 1 centred frames, float64.

    Not float32: a filter may lie eight decades below its neighbours, and a float32 transform returns noise there.
    """
    mirrored = wave[REFLECT:0:-1], wave, wave[-2 : -REFLECT - 2 : -1]
    padded = np.concatenate(mirrored, dtype=np.float64)
    # Each window starts (512 - 400) / 2 samples into its frame; samples outside the window weigh nothing.
    offset = (FFT_SIZE - WINDOW) // 2
    frames = np.lib.stride_tricks.sliding_window_view(padded[offset:], WINDOW)[: len(wave) + 1 : HOP]
    window, groups = _hann(), _filter_groups()
    # Where in the transform the window stands shifts only the phase, which the power does not keep.
    windowed = np.zeros((BLOCK_FRAMES, FFT_SIZE))
    spectrum = np.empty((BLOCK_FRAMES, FFT_SIZE // 2 + 1), np.complex128)
    real, imaginary = np.empty((2, *spectrum.shape))
    mel = np.empty((len(frames), NUM_MELS))
    for start in range(0, len(frames), BLOCK_FRAMES):
        block = frames[start : start + BLOCK_FRAMES]
        size = len(block)
        np.multiply(block, window, out=windowed[:size, :WINDOW])
        np.fft.rfft(windowed[:size], out=spectrum[:size])
        power = np.square(spectrum.real[:size], out=real[:size])
        power += np.square(spectrum.imag[:size], out=imaginary[:size])
        for bins, filters, weights in groups:
            np.matmul(power[:, bins], weights, out=mel[start : start + size, filters])
    return mel


@functools.cache
def _hann() -> Float[np.ndarray, " n"]:
    """Periodic Hann window: the period is WINDOW, so the last sample is not zero."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)


@functools.cache
def mel_filters() -> Float[np.ndarray, "bins mels"]:
    """Triangles on the HTK mel scale, [257 bins, 80 filters], peak 1 and not normalised by area.

    Corner j lies at (j / 81) of the mel of 8000 Hz; filter j rises from corner j to j + 1 and falls to j + 2. Some of
    the lowest filters are narrower than a bin and may hold none.
    """
    frequencies = np.linspace(0, SAMPLE_RATE / 2, FFT_SIZE // 2 + 1)
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, NUM_MELS + 2) / 2595) - 1)
    width = np.diff(corners)
    rising = (frequencies[:, None] - corners[None, :-2]) / width[None, :-1]
    falling = (corners[None, 2:] - frequencies[:, None]) / width[None, 1:]
    return np.maximum(0, np.minimum(rising, falling))


@functools.cache
def _filter_groups() -> list[tuple[slice, slice, Float[np.ndarray, "bins filters"]]]:
    """The filters in groups of neighbours: the bins that a group covers, the filters it holds, and their weights.

    An eighth of the work of one product with all 80 filters. The products are also too small for BLAS to start
    threads of its own, which take turns when clips are transformed in several threads at once.
    """
    weights, size = mel_filters(), NUM_MELS // FILTER_GROUPS
    groups = []
    for first in range(0, NUM_MELS, size):
        filters = slice(first, first + size)
        covered = np.flatnonzero(weights[:, filters].any(axis=1))
        bins = slice(int(covered[0]), int(covered[-1]) + 1)
        groups.append((bins, filters, np.ascontiguousarray(weights[bins, filters])))
    return groups
