import itertools
import math

import numpy as np
import pytest

from jgrpo.config import MetricOptions
from jgrpo.rewards import make_reward
from jgrpo.rewards.reward import BUILT_IN
from model_port.errors import UserError

COMPLETIONS = ["Ja", "a b", "größer", ""]
REFERENCES = ["Ja", "a c", "kleiner", "x"]


def test_one_name():
    reward = make_reward("bleu")
    out = reward(COMPLETIONS, REFERENCES)
    assert reward.names == ("bleu",) and out.shape == (4,) and out.dtype == np.float64
    assert out[0] == 1.0 and 0 < out[1] < 1 and out[2] == 0 and out[3] == 0


def test_weighted_sum_and_components(user_module):
    user_module.score = lambda completions, references, **_: [float(len(text)) for text in completions]
    reward = make_reward({"exact": 1.0, "user_rewards:score": 0.5, "chrf": 0.0})
    components = reward.components(COMPLETIONS, REFERENCES)
    assert list(components) == ["exact", "user_rewards:score", "chrf"] == list(reward.names)
    assert components["exact"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert components["user_rewards:score"].tolist() == [2.0, 3.0, 6.0, 0.0]
    assert components["chrf"][0] == 1.0
    assert reward(COMPLETIONS, REFERENCES).tolist() == reward.total(components).tolist() == [2.0, 1.5, 3.0, 0.0]


def test_columns_reach_user_functions(user_module):
    user_module.score = lambda completions, references, *, duration, **_: np.array(duration) / 2
    reward = make_reward("user_rewards:score")
    assert reward(["a", "b"], ["a", "b"], duration=[1.0, 3.0], question=["q", "r"]).tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("Ja", "Ja", 1.0),
        ("  Ja \n gern ", "Ja gern", 1.0),
        ("u\u0308ber", "\u00fcber", 1.0),
        ("ja", "Ja", 0.0),
        ("Ja.", "Ja", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match(completion, reference, expected):
    assert make_reward("exact")([completion], [reference]).tolist() == [expected]


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [("größer", "größer", 1.0), ("", "a", 0.0), ("a", "", 0.0), ("", "", 0.0), ("Yes.", "Yes, he was.", 0.2470)],
)
def test_chrf(completion, reference, expected):
    assert make_reward("chrf")([completion], [reference]) == pytest.approx([expected], abs=5e-5)


def fails_on_größer(completions, references, **_):
    if "größer" in completions:
        raise KeyError("größer")
    return [0.0] * len(completions)


def fails_together(completions, references, **_):
    if len(completions) > 1:
        raise RuntimeError("too many")
    return [0.0]


def with_value(value):
    return lambda completions, references, **_: [1.0, value, value, 1.0][: len(completions)]


@pytest.mark.parametrize(
    ("score", "problem", "index"),
    [
        (fails_on_größer, "failed with KeyError: 'größer'", 2),
        (fails_together, "failed with RuntimeError: too many, on 4 examples together and on none alone", 0),
        (lambda completions, references, **_: 1.0, "failed with TypeError", 0),
        (lambda completions, references, **_: [1.0, 1.0], "returned 2 values for 4 examples", 2),
        (lambda completions, references, **_: [1.0] * 5, "returned 5 values for 4 examples", 3),
        (with_value(math.nan), "returned nan", 1),
        (with_value(math.inf), "returned inf", 1),
        (with_value(None), "returned None", 1),
        (with_value("good"), "returned 'good'", 1),
    ],
)
def test_a_broken_reward_is_named_with_its_example(user_module, score, problem, index):
    user_module.score = score
    with pytest.raises(UserError) as caught:
        make_reward({"bleu": 1.0, "user_rewards:score": 1.0})(COMPLETIONS, REFERENCES)
    message = str(caught.value)
    assert "'user_rewards:score'" in message and problem in message and f"at example {index}:" in message
    assert f"completion {COMPLETIONS[index]!r}, reference {REFERENCES[index]!r}" in message


def test_the_failing_example_is_sought_with_its_own_columns(user_module):
    user_module.score = lambda completions, references, *, duration: [1 / seconds for seconds in duration]
    with pytest.raises(UserError, match="ZeroDivisionError.* at example 1: completion 'b'"):
        make_reward("user_rewards:score")(["a", "b", "c"], ["a", "b", "c"], duration=[1, 0, 2])


def test_long_texts_are_cut_in_messages_only(user_module):
    user_module.score = lambda completions, references, **_: [math.nan]
    with pytest.raises(UserError) as caught:
        make_reward("user_rewards:score")(["a" * 5000], ["b"])
    assert len(str(caught.value)) < 600 and "a…" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "blue",
            "'blue' is unknown: use one of bleu, chrf, rouge1, rouge2, rougeL, meteor, bertscore, wer, cer, exact, "
            "length, or your own function as module:function",
        ),
        ("no_such_module:score", "module 'no_such_module' cannot be imported"),
        ("user_rewards:missing", "module 'user_rewards' has no function 'missing'"),
        ("user_rewards:", "is unknown"),
        ({}, "needs a component"),
        ({"bleu": math.nan}, "the weight of reward 'bleu' is nan"),
    ],
)
def test_wrong_specs_are_refused_before_anything_is_scored(user_module, spec, message):
    with pytest.raises(UserError, match=message):
        make_reward(spec)


def test_every_column_has_one_value_per_completion():
    reward = make_reward("exact")
    with pytest.raises(UserError, match="2 completions but 1 values in 'references'"):
        reward(["a", "b"], ["a"])
    with pytest.raises(UserError, match="2 completions but 3 values in 'question'"):
        reward(["a", "b"], ["a", "b"], question=["q", "r", "s"])


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "bertscore"])
def test_every_built_in_reward_is_in_its_range_and_knows_identity(name):
    texts = ["Ja", "größer als das Haus", "u\u0308ber", "東京", "Yes, he was.", "", "a b c d e f g h"]
    options = MetricOptions(rouge_tokenizer="unicode")
    pairs = list(itertools.product(texts, texts))
    scores = make_reward(name, options=options)(*zip(*pairs, strict=True))
    assert scores.min() >= 0 and scores.max() <= 1
    same = make_reward(name, options=options)(texts[-1:], texts[-1:])
    assert same == pytest.approx([1.0], abs=0.01)  # METEOR's penalty leaves 1 - 0.5 / 8 ** 3


def test_the_reward_names_the_failing_example_of_a_built_in(monkeypatch):
    monkeypatch.setattr("jgrpo.rewards.built_in.word_accuracy", lambda said, wanted: 1 / len(said))
    with pytest.raises(UserError, match="reward 'wer' failed with ZeroDivisionError.* at example 3: completion ''"):
        make_reward("wer")(COMPLETIONS, REFERENCES)


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [("a b", "c d", 1.0), ("a", "a b c d", 0.25), ("a b c d", "a", 0.25), ("", "", 1.0), (" ", "a", 0.0)],
)
def test_length(completion, reference, expected):
    assert make_reward("length")([completion], [reference]).tolist() == [expected]


def test_components_are_brought_to_one_scale_within_their_group():
    reward = make_reward({"exact": 1.0, "length": 2.0, "bleu": 1.0}, scale="group")
    components = {
        "exact": np.array([[0.0, 1.0], [1.0, 1.0]]),
        "length": np.array([[0.2, 0.6], [0.0, 0.02]]),
        "bleu": np.array([[0.3, 0.3], [0.3, 0.3]]),  # all equal: teaches nothing, whatever its level
    }
    # Two samples are half their difference d away from the mean, with deviation d / sqrt(2).
    exact = 0.5 / (0.5**0.5 + 1e-4)
    far, near = 0.2 / (0.4 / 2**0.5 + 1e-4), 0.01 / (0.02 / 2**0.5 + 1e-4)
    expected = [[-exact - 2 * far, exact + 2 * far], [-2 * near, 2 * near]]
    np.testing.assert_allclose(reward.total(components), expected, rtol=1e-12)
    plain = make_reward({"exact": 1.0, "length": 2.0, "bleu": 1.0}).total(components)
    np.testing.assert_allclose(plain, [[0.7, 2.5], [1.3, 1.34]], rtol=1e-12)


def test_scaling_needs_groups():
    reward = make_reward({"exact": 1.0}, scale="group")
    with pytest.raises(UserError, match=r"of shape \[prompts, samples\], got \[2\] for 'exact'"):
        reward(["a", "b"], ["a", "b"])
    with pytest.raises(UserError, match="at least 2 samples per prompt"):
        reward.total({"exact": np.zeros((3, 1))})
    with pytest.raises(UserError, match="reward scale 'batch' is unknown: use one of none, group"):
        make_reward("exact", scale="batch")


def test_nothing_to_score():
    assert make_reward({"bleu": 1.0, "exact": 2.0})([], []).shape == (0,)
