import itertools
import sys
import time

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics import BLEU

from jgrpo.config import MetricOptions
from jgrpo.rewards import corpus_bleu, make_reward
from jgrpo.rewards.overlap import SentenceBleu
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
    assert 100 * SentenceBleu(MetricOptions(bleu_smooth="add-k"))(completion, reference) == pytest.approx(
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
    assert SentenceBleu(MetricOptions(bleu_lowercase=True))("JA", "ja") == 1.0


def test_tokenizer_is_passed_on():
    # 13a splits off the full stop, "none" leaves it on the word.
    assert SentenceBleu()("Ja.", "Ja!") > 0
    assert SentenceBleu(MetricOptions(bleu_tokenize="none"))("Ja.", "Ja!") == 0.0


def test_options_reach_the_reward():
    reward = make_reward("bleu", options=MetricOptions(bleu_lowercase=True))
    assert reward(["JA"], ["ja"]).tolist() == [1.0]


def test_corpus_score_is_not_the_mean_of_sentences():
    completions, references = ["a b c d e", "x"], ["a b c d e", "y"]
    score, signature = corpus_bleu(completions, references)
    # 5 of 6 words, 4 of 4 pairs, 3 of 3 triples, 2 of 2 quadruples, equal lengths.
    assert score == pytest.approx(100 * (5 / 6) ** 0.25, rel=1e-9)
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert corpus_bleu(completions, references, MetricOptions(bleu_lowercase=True))[1].startswith("nrefs:1|case:lc|")


def test_corpus_needs_pairs():
    for completions, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(UserError, match="at least one"):
            corpus_bleu(completions, references)


def with_option(name, value):
    """Options that the shape checker of the tests would refuse to construct."""
    options = MetricOptions()
    object.__setattr__(options, name, value)
    return options


def test_unknown_options_list_the_known_ones():
    with pytest.raises(UserError, match="metrics.bleu_tokenize must be one of '13a', 'intl', .* got 'spm'"):
        make_reward("bleu", options=with_option("bleu_tokenize", "spm"))
    with pytest.raises(UserError, match="metrics.bleu_smooth must be one of 'exp', 'floor', .* got 'add'"):
        corpus_bleu(["a"], ["a"], with_option("bleu_smooth", "add"))


UNICODE = ["", "Ja", "größer als", "gro\u0308ßer als", "東京 へ 行く", "naïve café — “quoted” 🙂", "a b c d e f, g!"]


@pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "zh", "none"])
def test_equal_to_sacrebleu(tokenize):
    pairs = list(itertools.product(UNICODE, UNICODE))
    rewards = make_reward("bleu", options=MetricOptions(bleu_tokenize=tokenize))(*zip(*pairs, strict=True))
    wanted = [sacrebleu.sentence_bleu(said, [reference], tokenize=tokenize).score / 100 for said, reference in pairs]
    np.testing.assert_allclose(rewards, wanted, rtol=1e-12)


def test_as_fast_as_sacrebleu():
    """Scoring adds little to sacrebleu's own loop; benchmarks/reward.py says how little.

    Of many interleaved rounds the fastest counts, in time of this thread, and the bound is wide, so that a busy machine
    does not decide.
    """
    random = np.random.default_rng(0)
    words = [f"wort{number}" for number in range(500)]
    reward, scorer = make_reward("bleu"), BLEU(effective_order=True)
    ours, theirs = [], []
    for _ in range(16):
        texts = [" ".join(random.choice(words, 60)) for _ in range(128 + 16)]
        completions, references = texts[16:], [text for text in texts[:16] for _ in range(8)]
        start = time.thread_time()
        reward.components(completions, references)
        middle = time.thread_time()
        for completion, reference in zip(completions, references, strict=True):
            scorer.sentence_score(completion, [reference])
        ours.append(middle - start)
        theirs.append(time.thread_time() - middle)
    assert min(ours) <= 1.5 * min(theirs)


@pytest.mark.parametrize(
    ("tokenize", "module"),
    [
        ("ja-mecab", "MeCab"),
        ("ko-mecab", "mecab_ko"),
        ("flores101", "sentencepiece"),
        ("flores200", "sentencepiece"),
        ("spBLEU-1K", "sentencepiece"),
    ],
)
def test_a_tokenizer_whose_package_is_missing_says_so(tokenize, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"metrics.bleu_tokenize '{tokenize}' cannot be used: .*pip install"):
        make_reward("bleu", options=MetricOptions(bleu_tokenize=tokenize))
