"""LibriSQA from its downloads: every row is a record or a named drop, and the records are what the files say."""

import json
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jgrpo.data.builders import build
from jgrpo.data.builders.librisqa import draw_validation, make_config
from model_port.audio import load_audio
from model_port.errors import UserError
from model_port.features import log_mel
from tests.data.corpora import LIBRISQA_DROPS, LIBRISQA_TRAIN, make_librisqa, read_lines


@pytest.fixture(scope="session")
def librisqa(tmp_path_factory):
    """The same downloads as archives and unpacked, by `archives`."""
    folders = {archives: tmp_path_factory.mktemp("librisqa") for archives in (True, False)}
    return {archives: make_librisqa(folder, archives) for archives, folder in folders.items()}


@pytest.fixture(scope="session", params=[True, False], ids=["archives", "unpacked"])
def built(request, librisqa, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    return build("librisqa/part1", manual_dir=librisqa[request.param], out=out, workers=0)


def records(directory):
    """The records of a built data set by split, texts decoded."""
    builder = tfds.builder_from_directory(directory)
    found = {}
    for split in builder.info.splits:
        source = builder.as_data_source(split)
        rows = [source[i] for i in range(len(source))]
        keep = ("audio", "features")
        found[split] = [
            {k: v.decode() if isinstance(v, bytes) and k not in keep else v for k, v in row.items()} for row in rows
        ]
    return found


def test_every_drop_is_named(built):
    for split, expected in LIBRISQA_DROPS.items():
        found = read_lines(built / "dropped" / f"{split}.jsonl")
        assert sorted((row["id"], row["reason"]) for row in found) == sorted(expected)
        assert all(row["line"] > 0 for row in found)
    assert read_lines(built / "dropped" / "validation.jsonl") == []
    card = json.loads((built / "jgrpo.json").read_text())
    assert card["drops"] == {
        "train": {
            "undecodable": 1,
            "empty clip": 1,
            "missing clip": 1,
            "duplicate id": 1,
            "empty text": 1,
            "bad row": 3,
        },
        "validation": {},
        "test": {"too short": 1},
    }
    details = {row["id"]: row["detail"] for row in read_lines(built / "dropped" / "train.jsonl")}
    assert details["14-208-0001"] == "the same texts as line 2"
    assert details["20-205-0004"] == "answer is missing"
    assert details["20-205-0000"] == "answer"


def test_all_rows_are_accounted_for(built):
    card = json.loads((built / "jgrpo.json").read_text())
    assert card["source"]["rows"] == {"train": 17, "validation": 3, "test": 6}  # a fifth of 15 rows is held out
    for split, rows in card["source"]["rows"].items():
        assert rows == card["splits"][split]["records"] + sum(card["drops"][split].values())
    assert card["source"]["clips_without_row"] == 0
    assert card["source"]["validation"] == {"grouping": "utterance", "fraction": 0.2, "seed": 0}
    assert card["task"]["reference"] == "answer" and "{question}" in card["task"]["prompts"][0]
    assert (card["format"], card["language"], card["features"]) == (1, "English", False)


def test_records_are_the_files(built, librisqa):
    files = {path.stem: path for path in (librisqa[False] / "LibriSpeech").rglob("*.flac")}
    entries = {}
    for path in librisqa[False].glob("LibriSQA-PartI/*.json"):
        for entry in filter(lambda one: isinstance(one, dict), json.loads(path.read_text())):
            entries.setdefault(entry["speech_path"].rsplit("/", 1)[-1].removesuffix(".wav"), entry)
    card = json.loads((built / "jgrpo.json").read_text())
    for split, rows in records(built).items():
        assert read_lines(built / "index" / f"{split}.jsonl") == [
            {key: value for key, value in row.items() if key != "audio"} for row in rows
        ]
        for row in rows:
            assert row["audio"] == files[row["id"]].read_bytes()
            assert row["samples"] == len(load_audio(files[row["id"]]))
            assert row["speaker"] == row["id"].split("-")[0]
            assert {key: row[key] for key in ("question", "answer", "text")} == {
                key: entries[row["id"]][key] for key in ("question", "answer", "text")
            }
        hours = sum(row["samples"] for row in rows) / 16000 / 3600
        assert card["splits"][split] == {"records": len(rows), "hours": pytest.approx(hours, abs=1e-4)}
    assert "tensorflow" not in sys.modules


def test_part_two_and_disjoint_speakers_and_features(librisqa, tmp_path):
    where = {"manual_dir": librisqa[True], "out": tmp_path, "workers": 0, "features": True, "grouping": "speaker"}
    built = build("librisqa/part2", validation_fraction=0.3, seed=2, **where)
    assert built == tmp_path / "librisqa" / "part2_speaker_validation0.3_seed2_features" / "1.0.0"
    found = records(built)
    speakers = {split: {row["speaker"] for row in rows} for split, rows in found.items()}
    assert speakers["validation"] and not speakers["train"] & speakers["validation"]
    for row in found["train"] + found["validation"] + found["test"]:
        assert row["question"].endswith("\nA. one\nB. two") and row["answer"] == "B"
        assert row["answer_and_analysis"] == f"B. two, as {row['id']} says."
        expected = log_mel(load_audio(row["audio"]))
        stored = np.frombuffer(row["features"], "<f4").reshape(-1, 160)
        np.testing.assert_array_equal(stored, expected)
    card = json.loads((built / "jgrpo.json").read_text())
    assert card["features"] and card["task"]["reference"] == "answer_and_analysis"


def test_rows_without_a_transcript_are_kept_and_counted(librisqa, tmp_path):
    for path in librisqa[False].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "LibriSQA-PartI").unlink()
    for split in ("train", "test"):  # flat, beside the audio
        path = librisqa[False] / "LibriSQA-PartI" / f"LibriSQA-PartI-{split}.json"
        entries = json.loads(path.read_text())
        entries[0].pop("text")
        (tmp_path / path.name).write_text(json.dumps(entries))
    built = build("librisqa/part1", manual_dir=tmp_path, out=tmp_path / "out", workers=0, validation_fraction=0.0)
    assert json.loads((built / "jgrpo.json").read_text())["source"]["rows_without_transcript"] == 2
    found = records(built)
    assert list(found) == ["train", "test"] and len(found["train"]) == len(LIBRISQA_TRAIN) * 3
    assert found["train"][0]["text"] == "" and found["train"][1]["text"]


def test_a_second_file_of_an_utterance_is_nobodys(librisqa, tmp_path):
    shutil.copytree(librisqa[False], tmp_path, dirs_exist_ok=True)
    audio = tmp_path / "LibriSpeech" / "train-clean-360"
    (audio / "99").mkdir()
    shutil.copy(audio / "14" / "208" / "14-208-0002.flac", audio / "99" / "14-208-0000.wav")
    built = build("librisqa/part1", manual_dir=tmp_path, out=tmp_path / "out", workers=0)
    assert json.loads((built / "jgrpo.json").read_text())["source"]["clips_without_row"] == 1
    (record,) = [row for rows in records(built).values() for row in rows if row["id"] == "14-208-0000"]
    assert record["audio"] == (audio / "14" / "208" / "14-208-0000.flac").read_bytes()


def test_held_out_rows_depend_on_ids_and_seed_alone():
    speakers = {f"{voice}-1-{k:04d}": str(voice) for voice in range(20) for k in range(10)}
    options = {"grouping": "utterance", "fraction": 0.2, "seed": 0}
    chosen = draw_validation(speakers, **options)
    assert len(chosen) == len(set(chosen)) == 40
    assert draw_validation(dict(reversed(speakers.items())), **options) == chosen
    assert set(draw_validation(speakers, **options | {"seed": 1})) != set(chosen)
    by_speaker = draw_validation(speakers, **options | {"grouping": "speaker"})
    voices = {speakers[name] for name in by_speaker}
    assert len(by_speaker) == 40 and {name for name in speakers if speakers[name] in voices} == set(by_speaker)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grouping": "chapter"}, "the grouping is 'chapter'; one of utterance, speaker is needed"),
        ({"fraction": 1.0}, "the validation fraction is 1.0; at least 0 and less than 1"),
        ({"seed": -1}, "the seed is -1; 0 or more"),
    ],
)
def test_a_split_that_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_config("part1", **options)


def test_what_is_missing_is_said_with_the_layout(tmp_path):
    (tmp_path / "train-clean-360.tar.gz").touch()
    with pytest.raises(UserError) as caught:
        build("librisqa/part1", manual_dir=tmp_path, out=tmp_path / "out", workers=0)
    message = str(caught.value)
    assert "no LibriSQA-PartI/LibriSQA-PartI-train.json" in message and "no test-clean.tar.gz" in message
    assert "no train-clean-360" not in message
    assert "https://www.openslr.org/12" in message
    with pytest.raises(UserError, match="nowhere: no such directory"):
        build("librisqa/part1", manual_dir=tmp_path / "nowhere", out=tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "not JSON .*Git LFS pointer"),
        ('{"speech_path": 1}\n{"speech_path": 2}', "not JSON"),
        ('{"speech_path": 1}', "one JSON array of objects is needed, not dict"),
        ("[]", "one JSON array"),
        ('[{"speech_path": "a.wav", "query": "?"}]', "no entry has all of answer, question, speech_path; the first"),
        ("[3]", "the first one has int"),
    ],
)
def test_a_json_file_of_another_kind_is_refused(librisqa, tmp_path, text, message):
    for path in librisqa[True].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "LibriSQA-PartI").unlink()
    for split in ("train", "test"):
        (tmp_path / f"LibriSQA-PartI-{split}.json").write_text(text)
    with pytest.raises(UserError, match=message):
        build("librisqa/part1", manual_dir=tmp_path, out=tmp_path / "out", workers=0)
    assert not list((tmp_path / "out").iterdir())
