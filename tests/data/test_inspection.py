import re

import pytest
import soundfile

from jgrpo.data.builders import build
from jgrpo.data.inspection import check_manifest, inspect_data
from model_port.errors import UserError
from tests.data.corpora import make_covost2
from tests.model_port.toy_tokenizer import make_model_dir


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(make_model_dir(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def covost2(tmp_path_factory):
    root = tmp_path_factory.mktemp("covost2")
    return build("covost2/en_de", manual_dir=make_covost2(root, archives=False), out=root / "built", workers=0)


@pytest.fixture
def nothing_is_decoded(monkeypatch):
    monkeypatch.delattr(soundfile.SoundFile, "read")


def row_of(text: str, title: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(title)]
    return line.strip().removeprefix(title).split()


def test_lengths_in_a_manifest(write_manifest, rows, model, processor, nothing_is_decoded):
    """Seven clips of 0.3, 0.4, 0.5, 0.6, 0.7, 1.3 and 1.9 s; 1.9 s are 191 mel frames, 95 stacked, 7 windows of 15."""
    text = inspect_data(str(write_manifest(rows)), model=model, records=0)
    assert text.splitlines()[0].endswith("train.jsonl: 7 lines, 0.00 hours")
    assert row_of(text, "seconds") == ["0.30", "0.60", "1.90", "1.90", "1.90"]
    assert row_of(text, "stacked frames of 20 ms") == ["15", "30", "95", "95", "95"]
    assert row_of(text, "audio tokens") == ["3", "6", "21", "21", "21"]
    prompt = len(processor.encode_prompts([rows[0]["prompt"]])[0]) - 1
    assert row_of(text, "text tokens of the prompt") == [str(prompt)] * 5
    tokens = sorted(len(processor.encode_reference(row["reference"])) for row in rows)
    assert row_of(text, "tokens of the reference") == [str(tokens[i]) for i in (0, 3, 6, 6, 6)]


def test_histogram_and_hours(write_manifest, rows):
    """Bins of 0.2 s from the shortest clip on; 1,000 times the seven lines are 1.58 hours."""
    text = inspect_data(str(write_manifest(rows * 1000)), records=0)
    assert "7,000 lines, 1.58 hours" in text
    bins = [line.split() for line in text.partition("clips by seconds")[2].splitlines()[1:]]
    assert bins[0] == ["0.2", "-", "0.4", "1,000", "#" * 20]
    assert bins[1] == ["0.4", "-", "0.6", "2,000", "#" * 40]
    assert [line[3] for line in bins] == ["1,000", "2,000", "2,000", "0", "0", "1,000", "0", "0", "1,000"]
    assert "text tokens" not in text


def test_examples_are_shown_as_they_are(write_manifest, rows):
    rows[1]["reference"] = "y" * 500
    rows[1]["tags"] = ["a", {"b": 1}]
    shown = inspect_data(str(write_manifest(rows)), records=2).split("\n\n")[-2:]
    assert re.fullmatch(
        r"  line 1: \S+/0\.wav, 0\.30 s\n    prompt: <\|audio\|> translate\.\n    reference: x\n    topic: topic 0",
        shown[0],
    )
    assert f"reference: {'y' * 160} ... (500 characters)" in shown[1]
    assert 'tags: ["a", {"b": 1}]' in shown[1]


def test_several_clips_in_an_example(write_manifest, rows):
    """0.3 and 0.4 s: 15 and 20 frames, one and two windows, nine tokens for the example."""
    pair = {"audio": ["0.wav", "1.wav"], "prompt": "<|audio|> or <|audio|>?", "reference": "x"}
    text = inspect_data(str(write_manifest([pair])), records=1)
    assert "2 clips, up to 2 in an example" in text
    assert row_of(text, "stacked frames of 20 ms") == ["15", "15", "20", "20", "20"]
    assert row_of(text, "audio tokens") == ["9"] * 5
    assert re.search(r"line 1: \S+0\.wav, 0\.30 s, \S+1\.wav, 0\.40 s", text)


def test_every_unusable_line_is_named(write_manifest, rows):
    bad = [rows[0] | {"audio": f"gone{k}.wav"} for k in range(12)]
    path = write_manifest([rows[0], *bad, rows[1], rows[2] | {"prompt": "no marker", "reference": ""}, "{"])
    for look in (check_manifest, inspect_data):
        with pytest.raises(UserError, match="14 unusable lines") as caught:
            look(str(path))
        lines = str(caught.value).splitlines()[1:]
        assert [line.split(":")[0].strip() for line in lines] == [f"line {n}" for n in [*range(2, 14), 15, 15, 16]]
        assert "gone11.wav: no such audio file" in lines[11]


def test_a_usable_manifest_is_described(write_manifest, rows, nothing_is_decoded):
    text = check_manifest(write_manifest(rows))
    assert text.splitlines()[0].endswith("7 lines, 0.00 hours")
    assert text.endswith("every line can be used")


def test_a_manifest_for_templates_needs_no_prompts(write_manifest, rows):
    for row in rows:
        del row["prompt"], row["reference"]
    text = check_manifest(write_manifest(rows))
    assert "no line has 'prompt': a run needs prompt templates" in text
    assert "no line has 'reference': a run needs the name of the column" in text
    with pytest.raises(UserError, match="line 1: 'prompt' is missing"):
        check_manifest(write_manifest([*rows, rows[0] | {"prompt": "<|audio|>"}]))


def test_all_faults_of_a_line_are_named(write_manifest):
    with pytest.raises(UserError, match="(?s)1 unusable line;.*'audio' is missing.*'prompt' is missing.*'reference'"):
        check_manifest(write_manifest([{"text": "a"}]))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_manifest_without_examples(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match="no examples"):
        check_manifest(tmp_path / "a.jsonl")


def test_a_built_data_set(covost2, model, nothing_is_decoded):
    """What tests.data.corpora makes: 10, 3 and 3 usable rows, and one of every fault."""
    text = inspect_data(str(covost2), model=model, records=1)
    head, *_ = text.split("\n\n")
    assert head.startswith(f"{covost2}: 16 records, 0.00 hours, audio\n  references are 'translation'; language German")
    sections = dict(re.findall(r"^(\w+): (?:\d+|no) records.*\n  (\d+ rows? dropped .*)$", text, flags=re.MULTILINE))
    assert sections == {
        "train": "8 rows dropped by the build: 1 REMOVE, 1 duplicate id, 1 empty clip, 1 empty text, 1 missing clip, "
        "1 no transcript, 1 truncated, 1 unsupported format",
        "validation": "1 row dropped by the build: 1 unsupported format",
        "test": "1 row dropped by the build: 1 too short",
        "unknown": "2 rows dropped by the build: 2 bad row",
    }
    assert text.count("tokens of the reference") == 3
    record = text.partition("  record 0: ")[2].split("\n\n")[0].splitlines()
    assert re.fullmatch(r"common_voice_en_\d+, \d\.\d\d s", record[0])
    assert {line.split(":")[0].strip() for line in record[1:]} == {
        "prompt",
        "reference",
        "speaker",
        "sentence",
        "language",
    }


def test_a_split_of_a_built_data_set(covost2):
    text = inspect_data(f"{covost2}:train[:3]", records=9)
    assert "train[:3]: 3 records" in text
    assert "8 rows dropped" in text
    assert "validation:" not in text
    assert re.findall(r"record (\d)", text) == ["0", "1", "2"]
    with pytest.raises(UserError, match="no split 'dev'"):
        inspect_data(f"{covost2}:dev")


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such manifest"):
        inspect_data(str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match="not a built data set"):
        inspect_data(str(tmp_path))
