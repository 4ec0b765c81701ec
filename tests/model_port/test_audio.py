import contextlib
import os
import pickle

import numpy as np
import pytest
import soundfile

from model_port.audio import AudioError, check_audio, load_audio

FORMATS = [
    ("a.wav", {}),
    ("a.flac", {}),
    ("a.mp3", {}),
    ("a.ogg", {}),
    ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
]


def sine(rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def without_tag(data: bytes) -> bytes:
    """An mp3 file less its first frame, which holds the length tag."""
    return data[data.find(data[:2], max(data.find(b"Xing"), data.find(b"Info"))) :]


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_every_format_becomes_mono_at_16_khz(tmp_path, name, options):
    """Both channels hold the tone, one at half its height: the mean is three quarters of it."""
    wave = sine(48000)
    soundfile.write(tmp_path / name, np.stack([wave, wave / 2], axis=1), 48000, **options)
    loaded = load_audio(tmp_path / name)
    assert loaded.dtype == np.float32
    assert loaded.shape == (8000,)
    assert check_audio(tmp_path / name) == 8000
    np.testing.assert_allclose(loaded[1000:-1000], 0.75 * sine(16000)[1000:-1000], atol=0.02)


@pytest.mark.parametrize("in_memory", ["a descriptor", "a Python object"])
@pytest.mark.parametrize(("name", "options"), [*FORMATS, ("untagged.mp3", {})])
def test_bytes_give_the_samples_of_the_file(tmp_path, monkeypatch, name, options, in_memory):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / name, 0.1 * rng.standard_normal((20000, 2)), 48000, **options)
    data = (tmp_path / name).read_bytes()
    if name == "untagged.mp3":
        data = without_tag(data)
        (tmp_path / name).write_bytes(data)
    if in_memory == "a Python object":
        monkeypatch.delattr("os.memfd_create", raising=False)
    assert check_audio(data) == check_audio(tmp_path / name)
    np.testing.assert_array_equal(load_audio(data), load_audio(tmp_path / name))


def test_16_khz_samples_are_kept_exactly(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(16000), 16000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), sine(16000))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
@pytest.mark.parametrize("samples", [2000, 12345, 12346, 12347])
def test_length_from_the_header_is_the_length_loaded(tmp_path, rate, samples):
    soundfile.write(tmp_path / "a.wav", np.zeros(samples, np.float32), rate)
    assert check_audio(tmp_path / "a.wav") == len(load_audio(tmp_path / "a.wav"))


@pytest.mark.parametrize("order", [1, -1])
def test_mp3_without_a_length_tag_is_measured(tmp_path, order):
    """Variable bit rate: the first frame is larger or smaller than the others, and the length guessed is far off."""
    loud = np.random.default_rng(0).standard_normal(48000).astype(np.float32) * 0.3
    wave = np.concatenate([np.zeros(96000, np.float32), loud][::order])
    soundfile.write(tmp_path / "a.mp3", wave, 48000, bitrate_mode="AVERAGE", compression_level=0.5)
    (tmp_path / "b.mp3").write_bytes(without_tag((tmp_path / "a.mp3").read_bytes()))
    assert abs(soundfile.info(str(tmp_path / "b.mp3")).frames - len(wave)) > 10000
    assert abs(check_audio(tmp_path / "b.mp3") - len(wave) // 3) < 1000
    assert check_audio(tmp_path / "b.mp3") == len(load_audio(tmp_path / "b.mp3"))


def test_mp3_tag_is_found_behind_an_id3_section(tmp_path, monkeypatch):
    """The tag states the length, so nothing is counted."""
    soundfile.write(tmp_path / "a.mp3", sine(48000, 2.0), 48000)
    size = 10_000
    header = b"ID3\x04\x00\x00" + bytes((size >> shift) & 127 for shift in (21, 14, 7, 0))
    (tmp_path / "b.mp3").write_bytes(header + bytes(size) + (tmp_path / "a.mp3").read_bytes())
    monkeypatch.setattr("model_port.audio._Endless", None)
    assert check_audio(tmp_path / "b.mp3") == 32000
    assert len(load_audio(tmp_path / "b.mp3")) == 32000


@pytest.mark.parametrize("read", [check_audio, load_audio])
@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, "missing", "no such audio file"),
        (b"", "empty", "not a readable audio file: it is empty"),
        (b"these are no samples" * 100, "unsupported", "not a readable audio file.*wav, flac, mp3"),
    ],
)
def test_unreadable_files_are_named(tmp_path, read, content, kind, message):
    path = tmp_path / "speech.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AudioError, match=f"speech.wav.*{message}") as caught:
        read(path)
    assert caught.value.kind == kind


@pytest.mark.parametrize("read", [check_audio, load_audio])
@pytest.mark.parametrize(("samples", "kind"), [(0, "empty"), (768, "too short")])
def test_too_short_files_are_named(tmp_path, read, samples, kind):
    """768 samples at 48 kHz are 256 at 16 kHz, one too few."""
    soundfile.write(tmp_path / "speech.wav", np.zeros(samples, np.float32), 48000)
    with pytest.raises(AudioError, match=f"speech.wav: {samples} samples at 48000 Hz are too short") as caught:
        read(tmp_path / "speech.wav")
    assert caught.value.kind == kind


@pytest.mark.parametrize(("name", "kind"), [("speech.mp3", "truncated"), ("speech.flac", "undecodable")])
def test_truncated_files_are_named(tmp_path, name, kind, capfd):
    soundfile.write(tmp_path / name, sine(48000, 3.0), 48000)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=rf"{name}: (the header promises|cannot decode)") as caught:
        load_audio(tmp_path / name)
    assert caught.value.kind == kind
    capfd.readouterr()  # the mp3 decoder also writes to the terminal


def test_bytes_are_named_as_told():
    with pytest.raises(AudioError, match="^84-121550-0000: not a readable"):
        load_audio(b"no sound", "84-121550-0000")
    with pytest.raises(AudioError, match="^audio of 8 bytes: not a readable"):
        load_audio(b"no sound")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(AudioError("a.wav: too short.", "too short")))
    assert (str(error), error.kind) == ("a.wav: too short.", "too short")


def test_no_descriptor_stays_open(tmp_path):
    def lowest_free() -> int:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    soundfile.write(tmp_path / "a.mp3", sine(48000), 48000)
    data = (tmp_path / "a.mp3").read_bytes()
    before = lowest_free()
    for source in (tmp_path / "a.mp3", data, without_tag(data), b"", b"no sound"):
        with contextlib.suppress(AudioError):
            load_audio(source)
    assert lowest_free() == before
