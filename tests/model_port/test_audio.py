import numpy as np
import pytest
import soundfile

from model_port.audio import check_audio, load_audio
from model_port.errors import UserError


def sine(rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.wav", {}),
        ("a.flac", {}),
        ("a.mp3", {}),
        ("a.ogg", {}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
    ],
)
def test_every_format_becomes_mono_at_16_khz(tmp_path, name, options):
    """Both channels hold the tone, one at half its height: the mean is three quarters of it."""
    wave = sine(48000)
    soundfile.write(tmp_path / name, np.stack([wave, wave / 2], axis=1), 48000, **options)
    loaded = load_audio(tmp_path / name)
    assert loaded.dtype == np.float32
    assert loaded.shape == (8000,)
    assert check_audio(tmp_path / name) == 8000
    np.testing.assert_allclose(loaded[1000:-1000], 0.75 * sine(16000)[1000:-1000], atol=0.02)


def test_16_khz_samples_are_kept_exactly(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(16000), 16000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), sine(16000))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
@pytest.mark.parametrize("samples", [2000, 12345, 12346, 12347])
def test_length_from_the_header_is_the_length_loaded(tmp_path, rate, samples):
    soundfile.write(tmp_path / "a.wav", np.zeros(samples, np.float32), rate)
    assert check_audio(tmp_path / "a.wav") == len(load_audio(tmp_path / "a.wav"))


def test_mp3_without_a_length_tag_is_measured(tmp_path):
    """Variable bit rate, and the frame that holds the tag cut off: the header's own estimate is far off."""
    loud = np.random.default_rng(0).standard_normal(48000).astype(np.float32) * 0.3
    wave = np.concatenate([np.zeros(96000, np.float32), loud])
    soundfile.write(tmp_path / "a.mp3", wave, 48000, bitrate_mode="AVERAGE", compression_level=0.5)
    data = (tmp_path / "a.mp3").read_bytes()
    second_frame = data.find(data[:2], data.find(b"Xing"))
    (tmp_path / "b.mp3").write_bytes(data[second_frame:])
    assert abs(soundfile.info(str(tmp_path / "b.mp3")).frames - len(wave)) > 10000
    assert abs(check_audio(tmp_path / "b.mp3") - len(wave) // 3) < 1000
    assert check_audio(tmp_path / "b.mp3") == len(load_audio(tmp_path / "b.mp3"))


def test_mp3_tag_is_found_behind_an_id3_section(tmp_path, monkeypatch):
    """The tag states the length, so nothing is decoded."""
    soundfile.write(tmp_path / "a.mp3", sine(48000, 2.0), 48000)
    size = 10_000
    header = b"ID3\x04\x00\x00" + bytes((size >> shift) & 127 for shift in (21, 14, 7, 0))
    (tmp_path / "b.mp3").write_bytes(header + bytes(size) + (tmp_path / "a.mp3").read_bytes())
    assert len(load_audio(tmp_path / "b.mp3")) == 32000
    monkeypatch.setattr("model_port.audio._decode", None)
    assert check_audio(tmp_path / "b.mp3") == 32000


@pytest.mark.parametrize("read", [check_audio, load_audio])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such audio file"),
        (b"", "not a readable audio file"),
        (b"these are no samples" * 100, "not a readable audio file.*wav, flac, mp3"),
    ],
)
def test_unreadable_files_are_named(tmp_path, read, content, message):
    path = tmp_path / "speech.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"speech.wav.*{message}"):
        read(path)


@pytest.mark.parametrize("read", [check_audio, load_audio])
@pytest.mark.parametrize("samples", [0, 768])
def test_too_short_files_are_named(tmp_path, read, samples):
    """768 samples at 48 kHz are 256 at 16 kHz, one too few."""
    soundfile.write(tmp_path / "speech.wav", np.zeros(samples, np.float32), 48000)
    with pytest.raises(UserError, match=f"speech.wav: {samples} samples at 48000 Hz are too short"):
        read(tmp_path / "speech.wav")


@pytest.mark.parametrize("name", ["speech.mp3", "speech.flac"])
def test_truncated_files_are_named(tmp_path, name, capfd):
    soundfile.write(tmp_path / name, sine(48000, 3.0), 48000)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"{name}: (the header promises|cannot decode)"):
        load_audio(tmp_path / name)
    capfd.readouterr()  # the mp3 decoder also writes to the terminal
