import numpy as np
import pytest

from jgrpo.rewards import BleuOptions, corpus_bleu, make_reward
from jgrpo.rewards.bleu import SentenceBleu
from model_port.errors import UserError

# Sentence BLEU in percent: exponential smoothing with effective order, and add-k.
SHORT_ANSWERS = [
    ("Yes.", "Yes, he was.", 15.78, 18.76),
    ("He went away.", "The man left the town because of the war.", 3.56, 7.13),
    ("Er ging nach Hause.", "Er ist nach Hause gegangen.", 20.80, 33.09),
    ("one two three four five", "alpha beta gamma delta epsilon", 0.0, 0.0),
    ("", "Yes, he was.", 0.0, 0.0),
]


@pytest.mark.parametrize(("completion", "reference", "exp", "add_k"), SHORT_ANSWERS)
def test_short_answers(completion, reference, exp, add_k):
    assert 100 * SentenceBleu()(completion, reference) == pytest.approx(exp, abs=0.005)
    assert 100 * SentenceBleu(BleuOptions(smooth_method="add-k"))(completion, reference) == pytest.approx(
        add_k, abs=0.005
    )


def test_by_hand():
    # "the cat sat" against "the cat ran": 2 of 3 words, 1 of 2 pairs, 0 of 1 triple smoothed to 1/2, no brevity.
    assert SentenceBleu()("the cat sat", "the cat ran") == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3), rel=1e-9)
    # All words right but half of them missing: the brevity penalty exp(1 - 4 / 2) alone.
    assert SentenceBleu()("a b", "a b c d") == pytest.approx(np.exp(-1.0), rel=1e-9)


@pytest.mark.parametrize(
    "text", ["Ja", "größer", "Er ist nach Hause gegangen.", "東京", "naïve café — “quoted”", "🙂 ok"]
)
def test_identical_text_scores_exactly_one(text):
    assert SentenceBleu()(text, text) == 1.0


@pytest.mark.parametrize(("completion", "reference"), [("", ""), ("", "a"), ("a", ""), ("  ", "a")])
def test_empty_text_scores_zero(completion, reference):
    assert SentenceBleu()(completion, reference) == 0.0


def test_case_counts_unless_told_otherwise():
    assert SentenceBleu()("JA", "ja") == 0.0
    assert SentenceBleu(BleuOptions(lowercase=True))("JA", "ja") == 1.0


def test_tokenizer_is_passed_on():
    # 13a splits off the full stop, "none" leaves it on the word.
    assert SentenceBleu()("Ja.", "Ja!") > 0
    assert SentenceBleu(BleuOptions(tokenize="none"))("Ja.", "Ja!") == 0.0


def test_options_reach_the_reward():
    reward = make_reward("bleu", bleu=BleuOptions(lowercase=True))
    assert reward(["JA"], ["ja"]).tolist() == [1.0]


def test_corpus_score_is_not_the_mean_of_sentences():
    completions, references = ["a b c d e", "x"], ["a b c d e", "y"]
    score, signature = corpus_bleu(completions, references)
    # 5 of 6 words, 4 of 4 pairs, 3 of 3 triples, 2 of 2 quadruples, equal lengths.
    assert score == pytest.approx(100 * (5 / 6) ** 0.25, rel=1e-9)
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert corpus_bleu(completions, references, BleuOptions(lowercase=True))[1].startswith("nrefs:1|case:lc|")


def test_corpus_needs_pairs():
    for completions, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(UserError, match="at least one"):
            corpus_bleu(completions, references)


def test_unknown_options_list_the_known_ones():
    with pytest.raises(UserError, match="tokenize 'spm' is unknown: use one of 13a, intl"):
        BleuOptions(tokenize="spm")
    with pytest.raises(UserError, match="smooth_method 'add' is unknown: use one of exp, floor"):
        BleuOptions(smooth_method="add")
