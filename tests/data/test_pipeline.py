import itertools

import grain
import numpy as np
import pytest
import soundfile

from jgrpo.data import PromptData, read_manifest
from model_port.errors import UserError
from model_port.features import log_mel, num_frames


@pytest.fixture
def make_data(write_manifest, rows, processor):
    def make(changed=None, **options):
        options = {"prompts_per_step": 4, "audio_buckets_seconds": (0.5, 1.0, 2.0), **options}
        return PromptData(read_manifest(write_manifest(changed or rows)), processor, **options)

    return make


HALVES = ([0, 1], [2, 3])  # of the rows of a batch, on two processes


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_same(a, b):
    """Equal in every field, arrays bit for bit."""
    for name in ("tokens", "mask", "audio_slots", "features", "lengths"):
        np.testing.assert_array_equal(getattr(a.batch, name), getattr(b.batch, name))
    np.testing.assert_array_equal(a.indices, b.indices)
    assert (a.references, a.columns) == (b.references, b.columns)


def test_rows_belong_together(make_data, processor):
    data = make_data(completion_tokens=12)
    for batch in take(data.stream(seed=0), 4):
        for p, index in enumerate(batch.indices.tolist()):
            example = data.examples[index]
            assert batch.references[p] == "x" * (index + 1)
            assert batch.columns == {"topic": [f"topic {i}" for i in batch.indices]}
            frames = num_frames(example.samples[0])
            wave, _ = soundfile.read(example.audio[0], dtype="float32")
            assert batch.batch.lengths[p, 0] == frames
            np.testing.assert_array_equal(batch.batch.features[p, 0, :frames], log_mel(wave))
            assert not batch.batch.features[p, 0, frames:].any()
            target = batch.reference_tokens[p, 0][batch.reference_mask[p, 0]]
            assert target.tolist() == processor.encode_reference(batch.references[p])
        assert batch.reference_tokens.shape == (4, 1, 12)
        assert batch.reference_tokens.dtype == np.int32


def test_every_epoch_holds_each_example_once_in_a_new_order(make_data):
    """Seven steps of four rows are four epochs of seven examples."""
    rows = np.concatenate([batch.indices for batch in take(make_data().stream(seed=3), 7)])
    epochs = [tuple(epoch) for epoch in rows.reshape(4, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_the_orders_are_grains(make_data):
    """A run that was begun with an earlier version goes on with the same batches."""
    data = make_data()
    order = grain.MapDataset.range(7).seed(3).shuffle().repeat()
    found = np.concatenate([batch.indices for batch in take(data.stream(seed=3), 5)])
    assert found.tolist() == [order[i] for i in range(20)]
    own = int(np.random.SeedSequence([3, 1]).generate_state(1)[0])
    beside = grain.MapDataset.range(7).shuffle(seed=own).repeat()
    assert data.further(seed=3, index=4).indices.tolist() == [beside[i] for i in range(16, 20)]


def test_the_same_seed_gives_the_same_batches(make_data):
    data = make_data()
    for a, b in zip(take(data.stream(seed=5), 4), take(make_data().stream(seed=5), 4), strict=True):
        assert_same(a, b)
    other = take(data.stream(seed=6), 4)
    assert any((a.indices != b.indices).any() for a, b in zip(take(data.stream(seed=5), 4), other, strict=True))


def test_resuming_at_any_step_gives_the_remaining_batches(make_data):
    data = make_data()
    batches = take(data.stream(seed=1), 6)
    for step in range(6):
        for expected, got in zip(batches[step:], data.stream(seed=1, start_step=step), strict=False):
            assert_same(got, expected)


def test_two_processes_hold_the_halves_of_the_same_global_batch(make_data):
    whole = take(make_data().stream(seed=2), 5)
    halves = [take(make_data(rows=HALVES[k]).stream(seed=2), 5) for k in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        for name in ("tokens", "mask", "audio_slots", "features", "lengths"):
            joined = np.concatenate([getattr(first.batch, name), getattr(second.batch, name)])
            np.testing.assert_array_equal(joined, getattr(batch.batch, name))
        np.testing.assert_array_equal(np.concatenate([first.indices, second.indices]), batch.indices)
        assert first.references + second.references == batch.references


def test_the_smallest_bucket_that_fits_the_whole_batch(make_data):
    """0.5, 1 and 2 s are 25, 50 and 100 frames; a clip of exactly 0.5 s fits the first."""
    data = make_data(prompts_per_step=1)
    frames = {int(batch.indices[0]): batch.batch.features.shape[2] for batch in data.epoch()}
    assert frames == {0: 25, 1: 25, 2: 25, 3: 50, 4: 50, 5: 100, 6: 100}
    for batch in take(make_data(prompts_per_step=2).stream(seed=0), 8):
        assert batch.batch.features.shape[2] == max(frames[i] for i in batch.indices)


@pytest.fixture
def many(make_data, rows):
    """Forty examples with clips of 0.25 to 2 s, as a function of PromptData's options."""
    changed = [{**rows[k % len(rows)], "topic": f"topic {k}"} for k in range(40)]
    return lambda **options: make_data(changed, **options)


def test_clips_of_like_length_stand_together(many):
    """Each window of four batches holds what it would anyway, in fewer shapes; epochs turn at ten batches."""
    plain, grouped = (take(many(length_window=window).stream(seed=3), 20) for window in (1, 4))
    padded = {}
    for name, batches in (("plain", plain), ("grouped", grouped)):
        padded[name] = sum(batch.batch.features.shape[2] for batch in batches)
    assert padded["grouped"] < 0.9 * padded["plain"]
    for start in range(0, 20, 4):
        drawn, found = ([batch.indices for batch in batches[start : start + 4]] for batches in (plain, grouped))
        assert sorted(np.concatenate(drawn)) == sorted(np.concatenate(found))
        if len(set(np.concatenate(drawn))) < 16:
            np.testing.assert_array_equal(drawn, found)
    # The long batches are not always the first or the last of their window.
    longest = [int(np.argmax([b.batch.features.shape[2] for b in grouped[s : s + 4]])) for s in (0, 4, 12, 16)]
    assert len(set(longest)) > 1
    assert len({tuple(batch.indices) for batch in take(many(length_window=4).stream(seed=4), 20)}) > 10


def test_like_lengths_do_not_depend_on_processes_or_on_where_a_run_goes_on(many):
    whole = take(many(length_window=4).stream(seed=2), 12)
    halves = [take(many(length_window=4, rows=HALVES[k]).stream(seed=2), 12) for k in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([first.indices, second.indices]), batch.indices)
        assert first.batch.features.shape[2] == batch.batch.features.shape[2]
    for step in (3, 4, 9):
        for expected, got in zip(whole[step:], many(length_window=4).stream(seed=2, start_step=step), strict=False):
            assert_same(got, expected)
    data = many(length_window=4)
    beside = [data.further(seed=2, index=index).indices for index in range(4)]
    assert len(np.unique(np.concatenate(beside))) == 16
    assert any((one != batch.indices).any() for one, batch in zip(beside, whole, strict=False))


def test_shapes_are_those_that_occur(make_data, rows):
    data = make_data(prompts_per_step=1)
    seen = {(batch.batch.features.shape[2], batch.batch.tokens.shape[1]) for batch in data.epoch()}
    assert sorted(seen) == data.shapes()
    assert [frames for frames, _ in data.shapes()] == [25, 50, 100]
    assert [frames for frames, _ in make_data(rows[:3]).shapes()] == [25]


def test_prompt_padding_is_audio_plus_text(make_data, processor, monkeypatch):
    """25 frames are two windows, six embeddings; the text is padded to a multiple of TEXT_STEP or to its limit."""
    monkeypatch.setattr("jgrpo.data.pipeline.TEXT_STEP", 32)
    (text,) = processor.encode_prompts(["<|audio|> translate."], system="")
    count = len(text) - 1
    assert count < 32
    assert make_data(system="").shapes()[0] == (25, 6 + 32)
    assert make_data(system="", max_prompt_tokens=count).shapes()[0] == (25, 6 + count)
    with pytest.raises(
        UserError, match=rf"line 1: the prompt has {count} text tokens; max_prompt_tokens is {count - 1}"
    ):
        make_data(system="", max_prompt_tokens=count - 1)


def test_prompts_with_several_clips(make_data, rows, monkeypatch):
    monkeypatch.setattr("jgrpo.data.pipeline.TEXT_STEP", 32)
    rows[1] = {"audio": ["0.wav", "3.wav"], "prompt": "<|audio|> or <|audio|>?", "reference": "first"}
    data = make_data(rows[:3], prompts_per_step=3, system="")
    assert data.shapes() == [(25, 2 * 6 + 32), (50, 2 * 12 + 32)]
    (batch,) = data.epoch()
    np.testing.assert_array_equal(batch.batch.lengths, [[15, 0], [15, 30], [25, 0]])
    assert batch.columns == {"topic": ["topic 0", None, "topic 2"]}


@pytest.mark.parametrize("size", [1, 2, 4, 7, 9])
def test_an_epoch_covers_everything_once_in_order(make_data, size):
    data = make_data(prompts_per_step=size)
    for _ in range(2):
        batches = list(data.epoch())
        assert [i for batch in batches for i in batch.indices][:7] == list(range(7))
        assert {len(batch.references) for batch in batches} == {size}


def test_an_epoch_on_two_processes_covers_everything_once(make_data):
    """Rows 4, 5 and 6 remain for the second batch: two on the first process, one on the second."""
    halves = [list(make_data(rows=HALVES[k]).epoch()) for k in range(2)]
    seen = [i for pair in zip(*halves, strict=True) for batch in pair for i in batch.indices]
    assert len(seen) == 8 and seen[:7] == list(range(7))


def test_cached_features_are_the_same(make_data, tmp_path):
    data, cached = make_data(), make_data(cache=True)
    expected = list(data.epoch())
    for _ in range(2):
        for a, b in zip(cached.epoch(), expected, strict=True):
            assert_same(a, b)
    for file in tmp_path.glob("*.wav"):
        file.unlink()
    for a, b in zip(cached.epoch(), expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"audio_buckets_seconds": (0.5, 1.0)},
            r"2 unusable lines(.|\n)*line 6: .*5.wav lasts 1.30 s and the longest audio bucket holds 1.00 s",
        ),
        ({"completion_tokens": 3}, "line 7: the reference has .* tokens with its end token; completions hold 3"),
        ({"audio_buckets_seconds": (2.0, 1.0)}, r"\(2.0, 1.0\) seconds; clip lengths in increasing order"),
        ({"audio_buckets_seconds": ()}, "clip lengths in increasing order"),
        ({"audio_buckets_seconds": (0.01, 2.0)}, "clip lengths in increasing order"),
        ({"prompts_per_step": 0}, "prompts_per_step is 0"),
    ],
)
def test_what_cannot_fit_is_refused_at_the_start(make_data, options, message):
    with pytest.raises(UserError, match=message):
        make_data(**options)


def test_a_reference_with_an_end_token_is_named_by_line(make_data, rows):
    rows[4]["reference"] = "a<|end_of_text|>"
    with pytest.raises(UserError, match=r"line 5: .*contains <\|end_of_text\|>"):
        make_data(rows, completion_tokens=20)


def test_audio_that_turns_out_damaged_is_named(make_data, tmp_path):
    data = make_data()
    soundfile.write(tmp_path / "2.wav", np.zeros(4000, np.float32), 16000)
    with pytest.raises(UserError, match="2.wav had 8000 samples when the run started and has 4000 now"):
        list(data.epoch())
    soundfile.write(tmp_path / "2.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"2.wav \(line 3 of .*train.jsonl\): audio contains NaN"):
        list(data.epoch())
    (tmp_path / "2.wav").unlink()
    with pytest.raises(UserError, match="2.wav: no such audio file"):
        list(data.epoch())
