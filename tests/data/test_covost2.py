"""CoVoST2 over Common Voice from its downloads: the table's traps, the join with validated.tsv, the layouts."""

import json
import shutil

import pytest
import tensorflow_datasets as tfds

from jgrpo.data.builders import build
from jgrpo.data.builders.covost2 import LANGUAGES, Covost2, read_table
from model_port.audio import load_audio
from model_port.errors import UserError
from tests.data.corpora import COVOST2_DROPS, QUOTED, make_covost2, read_lines


@pytest.fixture(scope="session")
def covost2(tmp_path_factory):
    """The same downloads as archives and unpacked, by `archives`."""
    folders = {archives: tmp_path_factory.mktemp("covost2") for archives in (True, False)}
    return {archives: make_covost2(folder, archives) for archives, folder in folders.items()}


@pytest.fixture(scope="session", params=[True, False], ids=["archives", "unpacked"])
def built(request, covost2, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    return build("covost2/en_de", manual_dir=covost2[request.param], out=out, workers=0)


def test_every_drop_is_named(built):
    found = {
        path.stem: [(row["id"], row["reason"]) for row in read_lines(path)]
        for path in (built / "dropped").glob("*.jsonl")
    }
    assert {split: sorted(rows) for split, rows in found.items()} == {
        split: sorted(rows) for split, rows in COVOST2_DROPS.items()
    }
    card = json.loads((built / "jgrpo.json").read_text())
    assert card["drops"]["train"] == dict.fromkeys(
        [
            "truncated",
            "empty clip",
            "missing clip",
            "unsupported format",
            "empty text",
            "REMOVE",
            "duplicate id",
            "no transcript",
        ],
        1,
    )
    assert card["drops"]["unknown"] == {"bad row": 2}
    details = {row["id"]: row for row in read_lines(built / "dropped" / "train.jsonl")}
    assert details["common_voice_en_2"]["detail"] == "other texts as line 4"
    assert details["common_voice_en_103"]["file"] == "common_voice_en_103.m4a"
    assert "19200 samples" in details["common_voice_en_100"]["detail"]


def test_all_rows_are_accounted_for(built):
    card = json.loads((built / "jgrpo.json").read_text())
    assert card["source"]["rows"] == {"train": 18, "validation": 4, "test": 4, "unknown": 2}
    for split, rows in card["source"]["rows"].items():
        kept = card["splits"].get(split, {"records": 0})["records"]
        assert rows == kept + sum(card["drops"][split].values())
    assert card["source"]["clips_without_row"] == 1
    assert (card["source"]["validated_repeated_rows"], card["source"]["validated_bad_rows"]) == (1, 1)
    assert (card["language"], card["task"]["reference"]) == ("German", "translation")
    assert any("{language}" in prompt for prompt in card["task"]["prompts"])


def test_records_are_the_files(built, covost2):
    clips = covost2[False] / "en" / "clips"
    builder = tfds.builder_from_directory(built)
    texts = {}
    for split in ("train", "validation", "test"):
        source = builder.as_data_source(split)
        rows = [source[i] for i in range(len(source))]
        index = read_lines(built / "index" / f"{split}.jsonl")
        assert [row["id"].decode() for row in rows] == [row["id"] for row in index]
        for row, line in zip(rows, index, strict=True):
            path = clips / f"{line['id']}.mp3"
            assert row["audio"] == path.read_bytes()
            assert row["samples"] == line["samples"] == len(load_audio(path))
            assert row["translation"].decode() == line["translation"]
            texts[line["id"]] = (line["speaker"], line["sentence"], line["translation"])
    assert texts["common_voice_en_0"] == ("00000000", "Sentence number 0.", "Satz Nummer 0, hörbar.")
    assert texts["common_voice_en_4"] == ("quoter", QUOTED, '"Satz Nummer 4, hörbar.')
    assert texts["common_voice_en_5"][2] == "Satz Nummer 5, hörbar."  # the quote before it swallowed nothing
    assert texts["common_voice_en_6"][2] == "Eins\tzwei"
    assert len(texts) == 16


@pytest.mark.parametrize("layout", ["cv-corpus-4-2019-12-10/en", "."])
def test_other_places_are_found(covost2, tmp_path, layout):
    root = tmp_path / "manual"
    shutil.copytree(covost2[False] / "en", root / layout)
    shutil.copy(covost2[False] / "covost_v2.en_de.tsv", root)
    built = build("covost2/en_de", manual_dir=root, out=tmp_path / "out", workers=0)
    assert json.loads((built / "jgrpo.json").read_text())["splits"]["train"]["records"] == 10


def test_what_is_missing_is_said_with_the_layout(covost2, tmp_path):
    with pytest.raises(UserError, match="no covost_v2.en_de.tsv.tar.gz .*, no en.tar.gz .*(?s:.*)dl.fbaipublicfiles"):
        build("covost2/en_de", manual_dir=tmp_path, out=tmp_path / "out")
    shutil.copytree(covost2[True], tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "en.tar.gz", tmp_path / "cv-corpus-9-en.tar.gz")
    with pytest.raises(UserError, match="several archives of en: .*cv-corpus-9-en.tar.gz.*; keep one"):
        build("covost2/en_de", manual_dir=tmp_path, out=tmp_path / "out")


def test_clips_without_their_table_are_refused(covost2, tmp_path):
    shutil.copytree(covost2[False], tmp_path, dirs_exist_ok=True)
    (tmp_path / "en" / "validated.tsv").unlink()
    with pytest.raises(UserError, match="en: there is no validated.tsv in it"):
        build("covost2/en_de", manual_dir=tmp_path, out=tmp_path / "out", workers=0)


def test_cells_are_taken_as_covost_takes_them():
    rows = [
        'a\tHe said "no\t1',
        "b\tone\\\ttwo\t2",
        "c\tback\\\\slash\t3",
        "d\tNA\t4",
        "e\ttoo few",
        "",
        "f\t\t6",
    ]
    text = "path\ttext\tn\n" + "\n".join(rows) + "\n"
    found = list(read_table(iter(text.splitlines(keepends=True)), "t.tsv", ("path", "n")))
    cells = [(line, row and (row["path"], row["text"])) for line, row in found]
    assert cells == [
        (2, ("a", 'He said "no')),
        (3, ("b", "one\ttwo")),
        (4, ("c", "back\\slash")),
        (5, ("d", "NA")),
        (6, None),
        (8, ("f", "")),
    ]
    with pytest.raises(UserError, match="t.tsv: no column translation; the first line has path, text, n"):
        list(read_table(iter(text.splitlines(keepends=True)), "t.tsv", ("path", "translation")))


def test_a_table_in_another_encoding_is_refused(covost2, tmp_path):
    shutil.copytree(covost2[False], tmp_path, dirs_exist_ok=True)
    table = tmp_path / "covost_v2.en_de.tsv"
    table.write_bytes(table.read_text(encoding="utf-8").encode("latin-1"))
    with pytest.raises(UserError, match="covost_v2.en_de.tsv: not a table in UTF-8"):
        build("covost2/en_de", manual_dir=tmp_path, out=tmp_path / "out", workers=0)


def test_all_official_pairs_can_be_built():
    pairs = [config.name for config in Covost2.BUILDER_CONFIGS if not config.features]
    assert len(pairs) == len(set(pairs)) == 15 + 21
    assert {code for pair in pairs for code in pair.split("_")} == set(LANGUAGES)
