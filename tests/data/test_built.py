"""Splits of built data sets: what they hold, which part of them, and what is wrong with one that cannot be used."""

import io
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from jgrpo.data import PromptData, read_examples
from jgrpo.data.prompts import TASKS, choose
from jgrpo.data.sources import set_names, source_name
from model_port.audio import load_audio
from model_port.errors import UserError
from model_port.features import log_mel

VERSION = "1.0.0"


def index(built, split, data="librisqa/part1"):
    lines = (built / data / VERSION / "index" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def source(built, split, data="librisqa/part1"):
    return tfds.builder_from_directory(built / data / VERSION).as_data_source(split)


@pytest.fixture
def make_data(built, processor):
    def make(path="librisqa/part1:train", **options):
        options = {"prompts_per_step": 4, "audio_buckets_seconds": (0.6, 1.5), **options}
        return PromptData(read_examples(f"{built}/{path}", vary=True), processor, **options)

    return make


@pytest.fixture
def copy(built, tmp_path):
    """A data set to spoil."""
    return shutil.copytree(built / "librisqa" / "part1", tmp_path / "part1")


def test_the_records_with_the_tasks_prompts(built):
    examples, rows, records = (
        read_examples(f"{built}/librisqa/part1:train"),
        index(built, "train"),
        source(built, "train"),
    )
    assert len(examples) == len(rows) == len(records) > 5
    task = TASKS["librisqa_part1"]
    for i, (example, row, record) in enumerate(zip(examples, rows, records, strict=True)):
        assert example.row == i and example.audio == (row["id"],) == (record["id"].decode(),)
        assert example.prompt == task.prompts[0].format(question=row["question"])
        assert example.reference == row["answer"]
        assert example.columns == {name: row[name] for name in row if name != "samples"} | {"language": "English"}
        wave, rate = soundfile.read(io.BytesIO(record["audio"]), dtype="float32")
        assert rate == 16000 and example.samples == (len(wave),)
        (features,) = examples.features(i)
        np.testing.assert_array_equal(features, log_mel(wave))


def test_training_asks_in_different_words(built):
    for data, name in (("librisqa/part1", "librisqa_part1"), ("covost2/en_de", "covost2")):
        task, rows = TASKS[name], index(built, "train", data)
        expected = [task.prompts[choose(row["id"], len(task.prompts))].format(language="German", **row) for row in rows]
        assert read_examples(f"{built}/{data}:train", vary=True).prompts == expected
        assert len(set(expected)) > 1
    german = read_examples(f"{built}/covost2/en_de:train")
    assert set(german.prompts) == {"<|audio|> listen to the speech and translate it into German."}
    assert german.references == [row["translation"] for row in rows]


def test_other_templates_and_another_reference(built):
    path = f"{built}/librisqa/part1:train"
    examples = read_examples(path, prompts=("<|audio|> by {speaker}",), reference="text")
    assert examples.prompts == [f"<|audio|> by {row['speaker']}" for row in index(built, "train")]
    assert examples.references == [row["text"] for row in index(built, "train")]
    with pytest.raises(
        UserError, match="names the column 'translation'; there are id, speaker, question, answer, text"
    ):
        read_examples(path, prompts=("<|audio|> {translation}",))
    with pytest.raises(UserError, match="part1:train: the references are to be 'translation'; there are id"):
        read_examples(path, reference="translation")


@pytest.mark.parametrize("part", ["[:3]", "[3:]", "[-2:]", "[:50%]", "[50%:]", "[10%:35%]", "[2:5]", "[1:99%]"])
def test_a_part_of_a_split_is_what_tfds_takes_for_it(built, part):
    examples = read_examples(f"{built}/librisqa/part1:train{part}")
    records = source(built, f"train{part}")
    assert [example.audio[0] for example in examples] == [record["id"].decode() for record in records]
    last = len(examples) - 1
    np.testing.assert_array_equal(
        examples.features(last)[0], log_mel(load_audio(records[last]["audio"], name="the last"))
    )


def test_stored_features_are_those_that_would_be_computed(make_data):
    computed, stored = make_data(), make_data("librisqa/part1_features:train")
    assert "Records" in type(stored.examples.stores[0]).__name__
    for a, b in zip(computed.epoch(), stored.epoch(), strict=True):
        np.testing.assert_array_equal(a.batch.features, b.batch.features)
        np.testing.assert_array_equal(a.batch.tokens, b.batch.tokens)
    # They are read, not computed again.
    stored.examples.stores[0]._source = [{**record, "audio": b""} for record in stored.examples.stores[0]._source]
    assert len(list(stored.epoch())) == len(list(computed.epoch()))


def test_any_step_can_be_resumed_on_any_number_of_processes(make_data):
    whole = list(itertools.islice(make_data().stream(seed=1), 6))
    for step in range(6):
        parts = [make_data(rows=rows) for rows in ([0, 1], [2, 3])]
        streams = [part.stream(seed=1, start_step=step) for part in parts]
        for expected, first, second in zip(whole[step:], *streams, strict=False):
            for name in ("tokens", "mask", "audio_slots", "features", "lengths"):
                joined = np.concatenate([getattr(first.batch, name), getattr(second.batch, name)])
                np.testing.assert_array_equal(joined, getattr(expected.batch, name))
            assert first.references + second.references == expected.references


def test_where_a_data_set_is_looked_for(built, copy, tmp_path):
    """The directory of a version, or the one above where there is only one."""
    exact = read_examples(f"{copy}/{VERSION}:test")
    assert exact.references == read_examples(f"{copy}:test").references
    shutil.copytree(copy / VERSION, copy / "1.1.0")
    with pytest.raises(UserError, match=r"part1 holds several data sets \(1.0.0, 1.1.0\); name one of them: .*1.1.0:"):
        read_examples(f"{copy}:test")
    with pytest.raises(UserError, match="nowhere is not a built data set: .*jgrpo data build"):
        read_examples(f"{tmp_path}/nowhere:test")
    with pytest.raises(UserError, match=r"is a directory; name a split of it: .*:train \(train, validation, test\)"):
        read_examples(f"{copy}/{VERSION}")
    with pytest.raises(UserError, match="has no split 'dev'; it has train, validation, test"):
        read_examples(f"{built}/librisqa/part1:dev")
    with pytest.raises(UserError, match=r"test\[3:3\] of 5 records holds none"):
        read_examples(f"{built}/librisqa/part1:test[3:3]")
    with pytest.raises(UserError, match=r"test\[9:\] is no part of 5 records"):
        read_examples(f"{built}/librisqa/part1:test[9:]")
    with pytest.raises(UserError, match="no such manifest"):
        read_examples(f"{built}/librisqa/part1:test[abc]")
    assert source_name("a/librisqa/part1:train[:5]") == "part1" and source_name("a/mine.jsonl") == "mine"
    assert source_name("a/librisqa/part1/1.0.0:test") == "part1"


def test_results_of_evaluation_sets_go_by_names_that_differ():
    paths = ["a/part1:test", "a/part1:validation[:50%]", "a/mine.jsonl"]
    assert set_names(paths) == dict(zip(["part1_test", "part1_validation_50", "mine"], paths, strict=True))
    with pytest.raises(UserError, match="part1_test twice: a/part1:test, b/part1:test"):
        set_names(["a/part1:test", "b/part1:test"])


def spoil(directory, **changes):
    card = directory / VERSION / "jgrpo.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | changes))


def test_data_sets_that_cannot_be_used(copy):
    path, card = f"{copy}:train", copy / VERSION / "jgrpo.json"
    whole, lines = card.read_text(), copy / VERSION / "index" / "train.jsonl"
    spoil(copy, format=2)
    with pytest.raises(UserError, match="jgrpo.json has format 2; this version reads format 1"):
        read_examples(path)
    card.write_text(whole[:-30])
    with pytest.raises(UserError, match="jgrpo.json is damaged .*build the data set again"):
        read_examples(path)
    card.write_text("{}")
    with pytest.raises(UserError, match="jgrpo.json is damaged .*format"):
        read_examples(path)
    card.write_text(whole)
    rows = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join(rows[:-1]))
    with pytest.raises(UserError, match=rf"has {len(rows) - 1} lines, jgrpo.json counts {len(rows)} records and"):
        read_examples(path)
    lines.write_text("".join([*rows[:-1], '{"id": "x"}\n']))
    with pytest.raises(UserError, match=rf"line {len(rows)} has the keys id; build"):
        read_examples(path)
    lines.write_text("".join([rows[1], rows[0], *rows[2:]]))
    examples = read_examples(path)
    with pytest.raises(UserError, match="record 1 of .*part1:train is '.*' and the index has '.*' there; build"):
        examples.features(1)
    lines.write_text("".join(rows))
    for file in (copy / VERSION).glob("*train.array_record*"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="record 2 of .*part1:train cannot be read"):
        read_examples(path).features(2)
    lines.unlink()
    with pytest.raises(UserError, match="train.jsonl is missing"):
        read_examples(path)


def test_an_empty_text_in_the_records_is_named(copy):
    lines = copy / VERSION / "index" / "train.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    rows[3]["answer"], rows[4]["question"] = " ", ""
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="1 unusable record; .*\n  record 3: 'answer' is ' '"):
        read_examples(f"{copy}:train")
    with pytest.raises(UserError, match="\n  record 4: the prompt needs 'question', which is ''"):
        read_examples(f"{copy}:train", reference="text")


def test_no_tensorflow(make_data):
    next(make_data().stream(seed=0))
    assert "tensorflow" not in sys.modules
