import numpy as np
import pytest
import sacrebleu

from jgrpo.config import MetricOptions
from jgrpo.rewards import corpus_scores, make_reward
from model_port.errors import UserError

COMPLETIONS = ["the cat sat on the mat today", "größer als 東京", "", "Ja"]
REFERENCES = ["the cat sat on a mat", "grösser als 東京", "nothing", "ja"]


def test_pooled_metrics():
    scores = corpus_scores(("wer", "bleu", "chrf", "cer"), COMPLETIONS, REFERENCES)
    assert list(scores) == ["wer", "bleu", "chrf", "cer"]
    assert scores["bleu"].value == sacrebleu.corpus_bleu(COMPLETIONS, [REFERENCES]).score
    assert scores["bleu"].label.startswith("BLEU nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert scores["chrf"].value == sacrebleu.corpus_chrf(COMPLETIONS, [REFERENCES]).score
    assert scores["chrf"].label.startswith("chrF2 nrefs:1|case:mixed|eff:yes|nc:6|nw:0|")
    # the -> a and one word more, größer, an empty text, Ja: 5 of 11 words.
    assert scores["wer"].value == pytest.approx(100 * 5 / 11)
    # the -> a, " today", ß -> ss, all of "nothing", J: 3 + 6 + 2 + 7 + 1 of 20 + 14 + 7 + 2 characters... by hand
    assert scores["cer"].value == pytest.approx(100 * (3 + 6 + 2 + 7 + 1) / (20 + 14 + 7 + 2))
    assert [name for name, score in scores.items() if score.lower_is_better] == ["wer", "cer"]


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "meteor", "exact", "length"])
def test_the_others_are_means_of_the_reward(name):
    options = MetricOptions(rouge_tokenizer="unicode")
    (score,) = corpus_scores([name], COMPLETIONS, REFERENCES, options).values()
    values = make_reward(name, options=options)(COMPLETIONS, REFERENCES)
    assert score.value == pytest.approx(100 * values.mean()) and "mean over examples" in score.label


def test_options_reach_the_scores_and_their_labels():
    options = MetricOptions(bleu_lowercase=True, rouge_tokenizer="unicode", rouge_stemmer=True)
    scores = corpus_scores(["bleu", "rougeL"], ["JA", "running größer"], ["ja", "runs größer"], options)
    assert "case:lc" in scores["bleu"].label
    assert scores["rougeL"].value == pytest.approx(100)
    assert "ROUGE-L F1, rouge-score 0.1.2 tokenizer=unicode stemmer=Porter" in scores["rougeL"].label
    plain = corpus_scores(["rougeL"], ["JA", "running größer"], ["ja", "runs größer"])["rougeL"]
    assert plain.value < 100 and "tokenizer=ascii stemmer=none" in plain.label


def test_a_function_of_the_users_is_averaged_as_it_is(user_module):
    user_module.seconds = lambda completions, references, *, duration: np.array(duration)
    columns = {"duration": [1.0, 2.0, 3.0, 10.0]}
    (score,) = corpus_scores(["user_rewards:seconds"], COMPLETIONS, REFERENCES, columns=columns).values()
    assert score.value == 4.0 and score.label == "mean over examples of user_rewards:seconds"


def test_wrong_calls_are_refused():
    for completions, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(UserError, match="at least one"):
            corpus_scores(["exact"], completions, references)
    with pytest.raises(UserError, match="'rouge3' is unknown"):
        corpus_scores(["rouge3"], COMPLETIONS, REFERENCES)
