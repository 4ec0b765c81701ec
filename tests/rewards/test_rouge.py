import itertools
import logging

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from jgrpo.config import MetricOptions
from jgrpo.rewards import make_reward
from jgrpo.rewards.rouge import AsciiTokenizer, UnicodeTokenizer, shared_tokenizer

KINDS = ("rouge1", "rouge2", "rougeL")
TEXTS = [
    "",
    "Yes",
    "the cats were running quickly away from running dogs",
    "the cat ran away",
    "Die Tür öffnet sich größer",
    "die Tu\u0308r o\u0308ffnet sich",
    "東京 へ 行く",
    "!?",
]
PAIRS = list(itertools.product(TEXTS, TEXTS))
UNICODE = MetricOptions(rouge_tokenizer="unicode")


@pytest.fixture(autouse=True)
def not_warned(monkeypatch):
    monkeypatch.setattr(AsciiTokenizer, "warned", False)


@pytest.mark.parametrize("stemmer", [False, True])
def test_ascii_is_rouge_score(stemmer):
    options = MetricOptions(rouge_stemmer=stemmer)
    components = make_reward(dict.fromkeys(KINDS, 1.0), options=options).components(*zip(*PAIRS, strict=True))
    scorer = RougeScorer(list(KINDS), use_stemmer=stemmer)
    wanted = [scorer.score(reference, completion) for completion, reference in PAIRS]
    for kind in KINDS:
        assert components[kind].tolist() == [score[kind].fmeasure for score in wanted]
    assert 0 < components["rouge2"].sum() < components["rougeL"].sum()


def test_the_stemmer_joins_inflected_words():
    completions, references = ["he walked"], ["he walking"]
    for options in (MetricOptions(), UNICODE):
        stemmed = MetricOptions(rouge_tokenizer=options.rouge_tokenizer, rouge_stemmer=True)
        assert make_reward("rouge1", options=options)(completions, references) == pytest.approx([0.5])
        assert make_reward("rouge1", options=stemmed)(completions, references) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Die Tür öffnet GRÖSSER.", ["die", "tür", "öffnet", "grösser"]),
        ("o\u0308ffnet", ["öffnet"]),
        ("snake_case x2 3,5", ["snake", "case", "x2", "3", "5"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are combining marks
        ("東京へ行く。", ["東京へ行く"]),
        ("— 🙂 …", []),
    ],
)
def test_the_unicode_tokenizer_loses_no_letter(text, words):
    assert UnicodeTokenizer().tokenize(text) == words


def test_unicode_by_hand():
    # tür, öffnet, sich, größer against tür, öffnet, sich: 3 of 4 and 3 of 3 words; 2 of 3 and 2 of 2 pairs.
    reward = make_reward(dict.fromkeys(KINDS, 1.0), options=UNICODE)
    components = reward.components(["Tür öffnet sich größer"], ["Tu\u0308r O\u0308ffnet, sich"])
    assert {kind: values[0] for kind, values in components.items()} == pytest.approx(
        {"rouge1": 6 / 7, "rouge2": 4 / 5, "rougeL": 6 / 7}
    )
    # In ascii these become t, r, ffnet, sich, gr, er and t, r, ffnet, sich.
    assert make_reward("rouge1")(["Tür öffnet sich größer"], ["Tür öffnet sich"]) == pytest.approx([8 / 10])


def test_lost_letters_are_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        reward = make_reward(dict.fromkeys(KINDS, 1.0))
        reward(["plain — text…"], ["no letter is lost"])
        assert not caplog.messages
        reward(["Die Tu\u0308r", "größer"], ["öffnet", "東京"])
        make_reward("rouge1")(["für"], ["für"])
        make_reward("rouge1", options=UNICODE)(["für"], ["für"])
    (message,) = caplog.messages
    assert "lost ö." in message or "lost ü." in message
    assert "Set metrics.rouge_tokenizer=unicode" in message


def test_a_text_is_split_once_for_all_kinds_and_its_group():
    shared_tokenizer.cache_clear()
    completions = [f"completion {number}" for number in range(6)]
    make_reward(dict.fromkeys(KINDS, 1.0))(completions, ["one reference"] * 6)
    split = shared_tokenizer("ascii", False)._split.cache_info()
    assert split.misses == 7 and split.hits == 6 * 2 * 3 - 7
    assert np.isfinite(shared_tokenizer.cache_info().hits)
