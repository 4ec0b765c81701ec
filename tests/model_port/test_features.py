import time

import numpy as np
import pytest

from model_port.errors import UserError
from model_port.features import HOP, MIN_SAMPLES, log_mel, num_frames

# Shortest; odd and even numbers of mel frames; one sample either side of a multiple of the hop; the released examples.
LENGTHS = (257, 258, 319, 320, 321, 479, 480, 1599, 1600, 1601, 16000, 16160, 16161, 93680, 142100)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def tone(samples: int) -> np.ndarray:
    t = np.arange(samples) / 16000
    return (0.5 * np.sin(2 * np.pi * (100 * t + 300 * t * t))).astype(np.float32)


def half_silent(samples: int) -> np.ndarray:
    return np.where(np.arange(samples) < samples // 2, np.float32(0), noise(samples))


def direct(wave: np.ndarray) -> np.ndarray:
    """The front end once more, float64, one frame and one filter at a time, the transform as a matrix product."""
    bins = np.arange(257)
    padded = np.concatenate([wave[256:0:-1], wave, wave[-2:-258:-1]]).astype(np.float64)
    window = np.zeros(512)
    window[56:456] = np.sin(np.pi * np.arange(400) / 400) ** 2
    transform = np.exp(-2j * np.pi * np.outer(np.arange(512), bins) / 512)
    hertz = np.array([700 * (10 ** (mel / 2595) - 1) for mel in np.arange(82) / 81 * 2595 * np.log10(1 + 8000 / 700)])
    filters = np.stack([np.interp(bins * 31.25, hertz[j : j + 3], [0, 1, 0]) for j in range(80)], axis=1)
    frames = np.stack([padded[t * 160 : t * 160 + 512] * window for t in range(len(wave) // 160 + 1)])
    log = np.log10(np.clip(np.abs(frames @ transform) ** 2 @ filters, 1e-10, None))
    mel = np.clip(log, log.max() - 8, None) / 4 + 1
    return np.concatenate([mel[: len(mel) // 2 * 2 : 2], mel[1 : len(mel) // 2 * 2 : 2]], axis=1)


@pytest.fixture(scope="module")
def reference():
    from transformers import GraniteSpeechFeatureExtractor

    return GraniteSpeechFeatureExtractor()


@pytest.mark.parity
@pytest.mark.parametrize("samples", LENGTHS)
@pytest.mark.parametrize("signal", [noise, half_silent])
def test_equals_transformers(reference, signal, samples):
    wave = signal(samples)
    expected = reference(wave)["input_features"][0].numpy()
    features = log_mel(wave)
    assert features.shape == expected.shape == (num_frames(samples), 160)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-5, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("samples", [257, 1601, 16000])
def test_equals_the_float64_reference_on_a_pure_tone(samples):
    """Decades below the tone the float32 reference returns its own rounding noise (up to 5e-5), so it is widened."""
    import torch
    from transformers import GraniteSpeechFeatureExtractor

    torch.set_default_dtype(torch.float64)
    try:
        mel_spectrogram = GraniteSpeechFeatureExtractor().mel_filters
    finally:
        torch.set_default_dtype(torch.float32)
    log = mel_spectrogram(torch.from_numpy(tone(samples)).double()).clamp(min=1e-10).log10()
    mel = (torch.maximum(log, log.max() - 8) / 4 + 1).T.numpy()
    assert mel.dtype == np.float64
    np.testing.assert_allclose(log_mel(tone(samples)), mel[: len(mel) // 2 * 2].reshape(-1, 160), atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [257, 480, 16000, 16161])
@pytest.mark.parametrize("signal", [noise, tone, half_silent])
def test_equals_the_definition_in_float64(signal, samples):
    np.testing.assert_allclose(log_mel(signal(samples)), direct(signal(samples)), atol=1e-6, rtol=0)


def test_long_clips_are_transformed_in_blocks_without_seams(monkeypatch):
    wave = noise(16000)
    whole = log_mel(wave)
    monkeypatch.setattr("model_port.features.BLOCK_FRAMES", 7)
    np.testing.assert_allclose(log_mel(wave), whole, atol=1e-6, rtol=0)


def test_silence_is_constant():
    """log10(1e-10) / 4 + 1."""
    np.testing.assert_array_equal(log_mel(np.zeros(1600, np.float32)), np.full((5, 160), -1.5, np.float32))


def test_frame_counts():
    """The stacked lengths of the released examples: 269920 samples give 844 frames."""
    assert [num_frames(n) for n in (257, 480, 16000, 93680, 142100, 269920)] == [1, 2, 50, 293, 444, 844]


def test_precision_of_the_input_does_not_matter():
    wave = noise(4000)
    np.testing.assert_array_equal(log_mel(wave.astype(np.float64)), log_mel(wave))


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(1600, np.int16), "dtype int16.*32768"),
        (np.zeros((2, 1600), np.float32), r"shape \(2, 1600\)"),
        (np.zeros(MIN_SAMPLES - 1, np.float32), "256 samples; at least 257"),
        (np.full(1600, np.nan, np.float32), "NaN"),
        (np.full(1600, np.inf, np.float32), "infinite"),
    ],
)
def test_unusable_audio_is_refused(wave, message):
    with pytest.raises(UserError, match=message):
        log_mel(wave)


def test_faster_than_a_hundred_times_real_time():
    wave = noise(16000 * 30)
    log_mel(wave[: HOP * 10])
    start = time.process_time()
    log_mel(wave)
    assert time.process_time() - start < 0.3
