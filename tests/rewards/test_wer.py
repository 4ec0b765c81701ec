import itertools
import random

import jiwer
import numpy as np
import pytest

from jgrpo.rewards import corpus_cer, corpus_wer, make_reward
from jgrpo.rewards.wer import edit_distance, word_errors
from model_port.errors import UserError


@pytest.mark.parametrize(
    ("completion", "reference", "errors", "reward"),
    [
        ("a b c", "a b c", 0, 1.0),
        ("a x c", "a b c", 1, 2 / 3),
        ("a c", "a b c", 1, 2 / 3),
        ("a b b c", "a b c", 1, 2 / 3),
        ("", "a b c", 3, 0.0),
        ("x y z w", "a b", 4, 0.0),  # WER 2: the reward stops at 0
        ("", "", 0, 1.0),
        ("a", "", 1, 0.0),
        ("b c d a", "a b c d", 2, 0.5),
        ("u\u0308ber uns", "\u00fcber  uns", 0, 1.0),
    ],
)
def test_word_errors(completion, reference, errors, reward):
    assert word_errors(completion, reference) == errors
    assert make_reward("wer")([completion], [reference]) == pytest.approx([reward])


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("abc", "abc", 1.0),
        ("a b", "ab", 0.5),  # the space counts
        (" a  b ", "a b", 1.0),
        ("grosse", "große", 1 - 2 / 5),
        ("u\u0308", "\u00fc", 1.0),
        ("東", "東京", 0.5),
        ("abcdef", "x", 0.0),
        ("", "", 1.0),
        ("a", "", 0.0),
    ],
)
def test_character_errors(completion, reference, reward):
    assert make_reward("cer")([completion], [reference]) == pytest.approx([reward])


def test_edit_distance_against_the_table():
    def by_table(said, wanted):
        rows = np.zeros((len(said) + 1, len(wanted) + 1), int)
        rows[:, 0], rows[0] = range(len(said) + 1), range(len(wanted) + 1)
        for i, j in itertools.product(range(len(said)), range(len(wanted))):
            substituted = rows[i, j] + (said[i] != wanted[j])
            rows[i + 1, j + 1] = min(substituted, rows[i, j + 1] + 1, rows[i + 1, j] + 1)
        return rows[-1, -1]

    chance = random.Random(0)
    for length in (1, 2, 3, 8, 63, 64, 65, 80):
        for _ in range(8):
            said = chance.choices("abc", k=chance.randrange(length + 1))
            wanted = chance.choices("abc", k=length)
            assert edit_distance(said, wanted) == by_table(said, wanted), (said, wanted)


def test_corpus_rates_pool_the_counts():
    assert corpus_wer(["a b c", "x"], ["a b d", "y"]) == pytest.approx(2 / 4)
    assert corpus_cer(["abc", "x"], ["abd", "y"]) == pytest.approx(2 / 4)
    completions = ["the cat sat", "größer als", "東京 へ", "", "one two three four"]
    references = ["the dog sat down", "großes als das", "東京", "gone", "one too three"]
    assert corpus_wer(completions, references) == pytest.approx(jiwer.wer(references, completions))
    assert corpus_cer(completions, references) == pytest.approx(jiwer.cer(references, completions))


def test_corpus_rates_need_references():
    with pytest.raises(UserError, match="WER needs a reference word"):
        corpus_wer(["a"], [""])
    with pytest.raises(UserError, match="CER needs a reference character"):
        corpus_cer(["a"], [" "])
    with pytest.raises(UserError, match="1 completions and 0 references"):
        corpus_wer(["a"], [])
