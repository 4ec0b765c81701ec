"""Several data sets interleaved: by weight, in an order that any process can compute at any step."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from jgrpo.config import DataOptions, GRPOConfig, GRPOOptions, ModelOptions, SFTConfig, SourceOptions
from jgrpo.data import PromptData, Source, read_examples, read_manifest
from jgrpo.data.mixture import Order
from jgrpo.data.run import describe, read_training
from model_port.errors import UserError


@pytest.fixture
def make_data(built, write_manifest, rows, processor):
    """A manifest of seven, LibriSQA and CoVoST2, in shares of 1, 2 and 3."""
    manifest = write_manifest(rows)

    def make(**options):
        sources = [
            Source(read_manifest(manifest), "mine", 1.0),
            Source(read_examples(f"{built}/librisqa/part1:train", vary=True), "sqa", 2.0),
            Source(read_examples(f"{built}/covost2/en_de:train", vary=True), "ast", 3.0),
        ]
        options = {"prompts_per_step": 4, "audio_buckets_seconds": (0.6, 1.0, 2.0), **options}
        return PromptData(sources, processor, **options)

    return make


def take(stream, count):
    return list(itertools.islice(stream, count))


def positions(order, count):
    return order(range(count)).tolist()


@pytest.mark.parametrize("weights", [(1, 2, 3), (0.15, 0.8, 0.05), (1e-3, 1, 7.7), (5, 5, 1)])
def test_every_stretch_holds_the_shares(weights):
    counts = (7, 9, 10)
    sources = np.searchsorted(np.cumsum(counts), Order(counts, weights, seed=3)(range(2000)), side="right")
    shares = np.array(weights) / sum(weights)
    for start in (0, 1, 333, 1500):
        for length in (1, 10, 100, 500):
            found = np.bincount(sources[start : start + length], minlength=3)
            assert np.abs(found - length * shares).max() < 2


def test_each_source_is_reshuffled_for_its_own_epochs():
    counts = (7, 9)
    order = np.array(positions(Order(counts, (1, 3), seed=0), 4 * 9 * 7))
    for start, count in ((0, 7), (7, 9)):
        own = order[(order >= start) & (order < start + count)] - start
        epochs = own[: len(own) // count * count].reshape(-1, count)
        assert len(epochs) >= 9 and (np.sort(epochs, axis=1) == np.arange(count)).all()
        assert len({tuple(epoch) for epoch in epochs}) > 5


def test_an_order_is_a_function_of_seed_and_position():
    counts, weights = (7, 9, 10), (1, 2, 3)
    whole = positions(Order(counts, weights, seed=5), 200)
    assert [Order(counts, weights, seed=5)([p]).item() for p in range(200)] == whole
    assert positions(Order(counts, weights, seed=6), 200) != whole
    beside = positions(Order(counts, weights, seed=5, further=True), 200)
    assert beside != whole and sorted(beside) != sorted(whole[::-1][:199])
    far = 10**9
    assert Order(counts, weights, seed=5)([far, far + 1]).shape == (2,)


def test_a_mixture_of_one_is_that_data_set(write_manifest, rows, processor):
    examples = read_manifest(write_manifest(rows))
    options = {"prompts_per_step": 4, "audio_buckets_seconds": (2.0,)}
    plain = PromptData(examples, processor, **options)
    mixed = PromptData([Source(examples, "mine", 0.3)], processor, **options)
    for a, b in zip(take(plain.stream(seed=1), 5), take(mixed.stream(seed=1), 5), strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_array_equal(a.batch.features, b.batch.features)
        assert a.sources is None and b.sources.tolist() == [0] * 4
    np.testing.assert_array_equal(plain.further(seed=1, index=3).indices, mixed.further(seed=1, index=3).indices)


def test_rows_belong_together(make_data):
    data = make_data(completion_tokens=60)
    assert data.counts == (7, 9, 10) and data.sources == ("mine", "sqa", "ast")
    seen = set()
    for batch in take(data.stream(seed=2), 12):
        for p, (index, source) in enumerate(zip(batch.indices.tolist(), batch.sources.tolist(), strict=True)):
            example = data.examples[index]
            assert source == np.searchsorted(np.cumsum(data.counts), index, side="right")
            assert batch.references[p] == example.reference
            assert {name: values[p] for name, values in batch.columns.items()} == example.columns
            text = ("topic", "question", "sentence")[source]
            assert [name for name in ("topic", "question", "sentence") if example.columns[name]] == [text]
            (features,) = data.examples.features(index)
            length = batch.batch.lengths[p, 0]
            np.testing.assert_array_equal(batch.batch.features[p, 0, :length], features)
            seen.add(source)
        assert batch.source_names == data.sources
    assert seen == {0, 1, 2}


def test_any_step_can_be_resumed_on_any_number_of_processes(make_data):
    data = make_data()
    whole = take(data.stream(seed=1), 6)
    halves = [make_data(rows=rows) for rows in ([0, 1], [2, 3])]
    for step in range(6):
        for expected, again in zip(whole[step:], data.stream(seed=1, start_step=step), strict=False):
            np.testing.assert_array_equal(expected.batch.features, again.batch.features)
            np.testing.assert_array_equal(expected.batch.tokens, again.batch.tokens)
        streams = [half.stream(seed=1, start_step=step) for half in halves]
        for expected, first, second in zip(whole[step : step + 2], *streams, strict=False):
            for name in ("tokens", "mask", "audio_slots", "features", "lengths"):
                joined = np.concatenate([getattr(first.batch, name), getattr(second.batch, name)])
                np.testing.assert_array_equal(joined, getattr(expected.batch, name))
            np.testing.assert_array_equal(np.concatenate([first.sources, second.sources]), expected.sources)


def options(built, *, kind=GRPOConfig, mixture=None, **changes):
    sources = [SourceOptions(f"{built}/librisqa/part1:train"), SourceOptions(f"{built}/covost2/en_de:train", 3.0)]
    return kind(
        run_dir="nowhere",
        model=ModelOptions(path="nowhere"),
        data=DataOptions(mixture=tuple(sources if mixture is None else mixture)),
        num_steps=1,
        prompts_per_step=1,
        **changes,
    )


def test_a_mixture_from_a_config(built, processor):
    sources = read_training(options(built).data)
    assert [(one.name, one.weight, len(one.examples)) for one in sources] == [("part1", 1.0, 9), ("en_de", 3.0, 10)]
    data = PromptData(sources, processor, prompts_per_step=4, min_seconds=0.5)
    notes = list(describe(data, None, dropped=Path("dropped.jsonl")))
    assert notes[0].startswith(f"part1 ({built}/librisqa/part1:train): 7 examples, 0.00 h; 2 dropped: 2 shorter than")
    assert notes[1].startswith(f"en_de ({built}/covost2/en_de:train): 8 examples") and "names what was" in notes[2]
    assert notes[3] == f"shapes of training batches: 10 s of audio with {data.shapes()[0][1]} tokens"
    twice = [SourceOptions(f"{built}/librisqa/part1:train"), SourceOptions(f"{built}/librisqa/part1:validation")]
    with pytest.raises(UserError, match="several sources called part1; give each a name of its own"):
        read_training(DataOptions(mixture=tuple(twice)))
    varied = [SourceOptions(f"{built}/librisqa/part1:train", prompts=("<|audio|> {text}",), reference="text")]
    (one,) = read_training(DataOptions(mixture=tuple(varied)))
    assert one.examples.prompts == [f"<|audio|> {text}" for text in one.examples.columns["text"]]


def test_a_reward_for_each_source(built):
    own = SourceOptions("a", reward=("rouge1", "wer"), reward_weights=(1.0, 0.5))
    config = options(built, mixture=(own, SourceOptions("b")), grpo=GRPOOptions(reward=("bleu",)))
    config.validate()
    assert config.reward_spec() == ({"rouge1": 1.0, "wer": 0.5}, {"bleu": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": ()}, "neither is set; set one of them"),
        ({"mixture": (SourceOptions("a", -1.0),)}, "data.mixture.0.weight is -1.0; a positive number is needed"),
        ({"mixture": (SourceOptions("a", float("nan")),)}, "data.mixture.0.weight is nan"),
        (
            {"mixture": (SourceOptions("a", reward=("bleu",), reward_weights=(1.0, 2.0)),)},
            "0.reward names 1 comp",
        ),
        ({"mixture": (SourceOptions("a"), SourceOptions("b", reward=("bleu",))), "kind": SFTConfig}, "1.reward is set"),
    ],
)
def test_mixtures_that_cannot_be(built, changes, message):
    with pytest.raises(UserError, match=message):
        options(built, **changes).validate()
