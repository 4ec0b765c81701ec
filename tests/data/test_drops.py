"""Examples that are left out, by reason and by name, and clips that turn out unreadable while training goes on."""

import itertools
import json

import numpy as np
import pytest

from jgrpo.data import PromptData, Source, read_manifest
from jgrpo.data.fit import summary, write_drops
from model_port.errors import UserError
from tests.data.conftest import SECONDS

BUCKETS = (0.5, 1.0, 2.0)
HALVES = ([0, 1], [2, 3])


@pytest.fixture
def make_data(write_manifest, rows, processor):
    def make(**options):
        options = {"prompts_per_step": 4, "audio_buckets_seconds": BUCKETS, **options}
        return PromptData(read_manifest(write_manifest(rows)), processor, **options)

    return make


def used(data):
    return [example.reference for example in data.examples]


@pytest.mark.parametrize(
    ("options", "dropped", "reason"),
    [
        ({"min_seconds": 0.4}, {1: "0.30 s"}, "shorter than 0.4 s"),
        ({"max_seconds": 1.3}, {7: "1.90 s"}, "longer than 1.3 s"),
        ({"max_reference_tokens": 6}, {6: "7 tokens", 7: "8 tokens"}, "reference above 6 tokens"),
        (
            {"unfit": "drop", "audio_buckets_seconds": (0.5, 1.0)},
            {6: "5.wav lasts 1.30 s and the longest audio bucket holds 1.00 s", 7: "6.wav lasts 1.90 s and"},
            "longer than the longest bucket, 1 s",
        ),
        (
            {"unfit": "drop", "completion_tokens": 7},
            {7: "the reference has 8 tokens with its end token; completions hold 7"},
            "reference above the 7 tokens of a completion",
        ),
        (
            {"unfit": "drop", "max_prompt_tokens": 38, "system": ""},
            {4: "the prompt has"},
            "prompt above 38 text tokens",
        ),
    ],
)
def test_what_is_dropped_is_named_and_counted(make_data, rows, tmp_path, options, dropped, reason):
    rows[3]["prompt"] += " And say it slowly, please, in all the words there are."
    rows[5]["id"] = "the sixth"
    data = make_data(**options)
    (drops,) = data.drops
    assert used(data) == ["x" * k for k in range(1, 8) if k not in dropped]
    assert len(data) == data.counts[0] == 7 - len(dropped)
    assert summary(drops) == f"{len(dropped)} {reason}"
    write_drops(drops, tmp_path / "dropped.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == list(dropped)
    for line in lines:
        assert line["data"] == str(tmp_path / "train.jsonl") and line["reason"] == reason
        assert dropped[line["line"]] in line["detail"]
        assert line["id"] == ("the sixth" if line["line"] == 6 else None)
    # What is left goes with its own prompts, references and audio.
    for batch in itertools.islice(data.stream(seed=0), 3):
        for p, text in enumerate(batch.references):
            k = len(text) - 1
            assert data.examples.prompts[batch.indices[p]] == rows[k]["prompt"]
            assert batch.batch.lengths[p, 0] == int(SECONDS[k] * 50)
            if batch.reference_tokens is not None:
                assert batch.reference_mask[p].sum() == k + 2
    write_drops([], tmp_path / "dropped.jsonl")
    assert not (tmp_path / "dropped.jsonl").exists()


def test_several_reasons_and_both_clips_of_an_example(make_data, rows):
    rows[0]["audio"], rows[0]["prompt"] = ["1.wav", "6.wav"], "<|audio|> or <|audio|>?"
    data = make_data(min_seconds=0.45, max_seconds=1.5, max_reference_tokens=6)
    assert used(data) == ["x" * k for k in (3, 4, 5)]
    found = {(drop.row, drop.reason): drop.detail for drop in data.drops[0]}
    assert found == {
        (1, "shorter than 0.45 s"): "0.40 s; 1.90 s",
        (2, "shorter than 0.45 s"): "0.40 s",
        (7, "longer than 1.5 s"): "1.90 s",
        (6, "reference above 6 tokens"): "7 tokens",
    }
    assert summary(data.drops[0]).startswith("2 shorter than 0.45 s, 1 ")


def test_references_stay_with_their_examples(make_data, rows):
    rows[2]["reference"] = "y" * 20
    data = make_data(unfit="drop", completion_tokens=9)
    assert [drop.row for drop in data.drops[0]] == [3]
    for batch in itertools.islice(data.stream(seed=0), 3):
        lengths = [len(text) + 1 for text in batch.references]
        np.testing.assert_array_equal(batch.reference_mask.sum((1, 2)), lengths)


def test_nothing_is_left(make_data):
    with pytest.raises(UserError, match=r"train.jsonl: every example is dropped \(7 shorter than 3 s\)"):
        make_data(min_seconds=3.0)


def test_what_does_not_fit_is_refused_unless_it_may_be_dropped(make_data):
    with pytest.raises(UserError, match="correct or remove, or set data.unfit to drop for training:\n  line 6: "):
        make_data(audio_buckets_seconds=(0.5, 1.0))


@pytest.fixture
def broken(tmp_path):
    """Break clips of the manifest, after it was read."""

    def spoil(*numbers):
        for k in numbers:
            (tmp_path / f"{k}.wav").write_bytes(b"RIFF")

    return spoil


def steps(data, count=8, **options):
    return list(itertools.islice(data.stream(seed=4, **options), count))


def test_an_unreadable_clip_is_named_counted_and_replaced(make_data, broken, tmp_path):
    whole, data = steps(make_data()), make_data(max_unreadable=1)
    broken(4)
    stream, told = data.stream(seed=4), []
    for expected in whole:
        batch = next(stream)
        told.append(data.take_skipped())
        same = batch.indices == expected.indices
        assert ((expected.indices == 4) == ~same).all() and 4 not in batch.indices
        assert len(told[-1]) == (~same).sum() == len(batch.skipped)
        assert batch.batch.features.shape == expected.batch.features.shape
        for p, index in enumerate(batch.indices.tolist()):
            assert batch.references[p] == "x" * (index + 1)
            assert batch.batch.lengths[p, 0] == int(SECONDS[index] * 50)
    path = tmp_path / "train.jsonl"
    (message,) = next(found for found in told if found)
    assert message.startswith(f"line 5 of {path} cannot be read, and line ") and "takes its place: " in message
    assert "4.wav: " in message and data.take_skipped() == [] and sum(map(len, told)) >= 4


def test_the_substitute_does_not_depend_on_who_reads_when(make_data, broken):
    data = [make_data(max_unreadable=2, rows=rows) for rows in (None, *HALVES, None)]
    broken(4, 1)
    whole, first, second = map(steps, data[:3])
    for a, b, c in zip(whole, first, second, strict=True):
        np.testing.assert_array_equal(np.concatenate([b.indices, c.indices]), a.indices)
        np.testing.assert_array_equal(np.concatenate([b.batch.features, c.batch.features]), a.batch.features)
        assert b.skipped + c.skipped == a.skipped
    for a, b in zip(whole[5:], steps(data[3], 3, start_step=5), strict=True):  # as after a restart
        np.testing.assert_array_equal(a.indices, b.indices)
        assert a.skipped == b.skipped


def test_too_many_unreadable_clips_are_all_named(make_data, broken):
    data = make_data(max_unreadable=1)
    broken(2, 4)
    with pytest.raises(UserError) as caught:
        steps(data)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("2 examples cannot be read and data.max_unreadable is 1; restore or remove")
    assert [line.split(" of ")[0] for line in lines] == ["  line 3", "  line 5"]
    for _ in range(2):  # what is known to be unreadable is so the second time, too
        with pytest.raises(UserError, match="2 examples cannot be read and data.max_unreadable is 1"):
            steps(data)
    with pytest.raises(UserError, match="(1 example|2 examples) cannot be read and data.max_unreadable is 0"):
        steps(make_data_of(data))


def make_data_of(data):
    """The same examples, none of which may be missing."""
    return PromptData(data.examples, data._processor, prompts_per_step=4, audio_buckets_seconds=BUCKETS)


def test_further_prompts_are_replaced_too_and_epochs_are_strict(make_data, broken):
    data = make_data(max_unreadable=1)
    expected = [data.further(seed=0, index=k).indices for k in range(6)]
    broken(4)
    found = [data.further(seed=0, index=k).indices for k in range(6)]
    assert any((a == 4).any() for a in expected) and not any((a == 4).any() for a in found)
    assert len(data.take_skipped()) == sum((a == 4).sum() for a in expected)
    with pytest.raises(UserError, match="4.wav: .*\nline 5 of .* is needed: nothing can take its place here"):
        list(data.epoch())
    with pytest.raises(UserError, match="is needed"):
        data.gather(np.array([0, 4, 1, 2]))


def test_a_substitute_is_of_the_same_source(write_manifest, rows, processor, broken, tmp_path):
    examples = read_manifest(write_manifest(rows))
    other = read_manifest(write_manifest([{**row, "reference": "other"} for row in rows[:3]]))
    data = PromptData(
        [Source(examples, "a"), Source(other, "b")],
        processor,
        prompts_per_step=4,
        audio_buckets_seconds=BUCKETS,
        max_unreadable=4,
    )
    expected = steps(data, 12)
    fresh = PromptData(
        [Source(examples, "a"), Source(other, "b")],
        processor,
        prompts_per_step=4,
        audio_buckets_seconds=BUCKETS,
        max_unreadable=4,
    )
    broken(1, 2)
    for batch, before in zip(steps(fresh, 12), expected, strict=True):
        np.testing.assert_array_equal(batch.sources, before.sources)
        assert batch.batch.features.shape == before.batch.features.shape
        for p, source in enumerate(batch.sources.tolist()):
            assert (batch.references[p] == "other") == bool(source)


def test_nothing_can_take_the_place(make_data, rows, broken):
    del rows[1:]
    data = make_data(prompts_per_step=1, max_unreadable=3)
    broken(0)
    with pytest.raises(UserError, match="nothing can be read that fits in the place of line 1 of"):
        steps(data, 1)
