import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jgrpo.data import read_manifest
from model_port.errors import UserError

GOOD = {"audio": "0.wav", "prompt": "<|audio|> translate.", "reference": "Grüße"}


def test_examples_in_order_with_lengths_and_columns(write_manifest):
    two = {"audio": ["1.wav", "2.wav"], "prompt": "<|audio|> or <|audio|>?", "reference": "b", "topic": "x", "n": 3}
    examples = read_manifest(write_manifest([GOOD, "", two]))
    first, second = examples
    assert (first.row, second.row) == (1, 3)
    assert (first.reference, first.columns) == ("Grüße", {"topic": None, "n": None})
    assert [Path(path).name for path in second.audio] == ["1.wav", "2.wav"]
    assert (first.samples, second.samples) == ((4800,), (6400, 8000))
    assert second.columns == {"topic": "x", "n": 3}
    assert tuple(examples.columns) == ("topic", "n")


def test_absolute_paths_and_a_byte_order_mark(write_manifest, tmp_path):
    soundfile.write(tmp_path / "deep.wav", np.zeros(4800, np.float32), 16000)
    manifest = write_manifest(["\ufeff" + json.dumps({**GOOD, "audio": str(tmp_path / "deep.wav")})])
    assert read_manifest(manifest)[0].audio == (str(tmp_path / "deep.wav"),)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{not json", r"not JSON \("),
        ("[1, 2]", "a JSON object is needed, not list"),
        ({**GOOD, "prompt": ""}, "'prompt' is ''; a text is needed"),
        ({**GOOD, "reference": 3}, "'reference' is 3; a text is needed"),
        ({"audio": "0.wav", "prompt": "<|audio|>"}, "'reference' is missing"),
        ({"prompt": "<|audio|>", "reference": "x"}, "'audio' is missing"),
        ({**GOOD, "audio": []}, r"'audio' is \[\]; a path or a list of paths"),
        ({**GOOD, "audio": ["0.wav", 1]}, "a path or a list of paths"),
        ({**GOOD, "audio": ["0.wav", "1.wav"]}, r"holds 1 <\|audio\|> markers for 2 audio files"),
        ({**GOOD, "prompt": "translate."}, r"holds 0 <\|audio\|> markers for 1 audio files"),
        ({**GOOD, "references": "x"}, "'references' is reserved"),
        ({**GOOD, "audio": "absent.wav"}, "absent.wav: no such audio file"),
        ({**GOOD, "audio": "train.jsonl"}, "train.jsonl: not a readable audio file"),
        ({**GOOD, "audio": "empty.wav"}, "empty.wav: 0 samples at 16000 Hz are too short"),
    ],
)
def test_a_bad_line_is_named_with_its_number(write_manifest, tmp_path, line, fault):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    path = write_manifest([GOOD, "", line, GOOD])
    with pytest.raises(UserError, match=rf"train.jsonl: 1 unusable line; .*\n  line 3: .*{fault}"):
        read_manifest(path)


def test_text_that_is_not_utf8_is_named(write_manifest):
    path = write_manifest([GOOD])
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 2: not JSON \(.*utf-8"):
        read_manifest(path)


def test_ten_faults_are_listed_in_order_and_the_rest_counted(write_manifest):
    bad = [{**GOOD, "audio": f"absent{k}.wav"} for k in range(6)] + ["?"] * 7
    with pytest.raises(UserError) as caught:
        read_manifest(write_manifest([GOOD, *bad]))
    lines = str(caught.value).splitlines()
    assert "13 unusable lines" in lines[0]
    assert [line.split(":")[0] for line in lines[1:11]] == [f"  line {n}" for n in range(2, 12)]
    assert lines[11:] == ["  and 3 more"]


def test_no_manifest_and_no_examples(write_manifest, tmp_path):
    with pytest.raises(UserError, match="absent.jsonl: no such manifest"):
        read_manifest(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="no examples"):
        read_manifest(write_manifest([]))
