import itertools

import nltk
import pytest
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import single_meteor_score

from jgrpo.config import MetricOptions
from jgrpo.rewards import corpus_scores, make_reward
from jgrpo.rewards.meteor import WORDNET_FILES, NoSynonyms, load_wordnet
from model_port.errors import UserError

TEXTS = [
    "",
    "Yes",
    "The man sat on the sofa.",
    "the men, seated on couches, didn't drive cars",
    "an automobile ran quickly past the couch",
    "Die Tür öffnet sich größer",
    "die Tu\u0308r",
    "東京 へ 行く",
]
PAIRS = list(itertools.product(TEXTS, TEXTS))
SYNONYMS = {
    "noun": [("sofa", "couch", "lounge"), ("car", "auto", "automobile"), ("man", "adult_male")],
    "verb": [("run", "go", "pass")],
    "adj": [("big", "large")],
    "adv": [("quickly", "rapidly")],
}
EXCEPTIONS = {"noun": "men man\n", "verb": "ran run\n"}


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """A WordNet of a few words, in the files that nltk reads, where nltk looks for them."""
    root = tmp_path / "corpora" / "wordnet"
    root.mkdir(parents=True)
    for kind, groups in SYNONYMS.items():
        data, index = "  1 WordNet 3.0 Copyright by its authors.\n", ""
        for words in groups:
            listed = " ".join(f"{word} 0" for word in words)
            offset = f"{len(data):08d}"
            data += f"{offset} 03 {kind[0] if kind != 'adv' else 'r'} {len(words):02x} {listed} 000 | a gloss\n"
            index += "".join(f"{word} {kind[0] if kind != 'adv' else 'r'} 1 0 1 0 {offset}\n" for word in words)
        (root / f"data.{kind}").write_text(data)
        (root / f"index.{kind}").write_text(index)
        (root / f"{kind}.exc").write_text(EXCEPTIONS.get(kind, ""))
    monkeypatch.setattr(nltk.data, "path", list(nltk.data.path))
    load_wordnet.cache_clear()
    yield root
    load_wordnet.cache_clear()


def meteor_of_nltk(wordnet):
    split = NLTKWordTokenizer().tokenize
    return [single_meteor_score(split(wanted), split(said), wordnet=wordnet) for said, wanted in PAIRS]


def test_without_wordnet_words_match_by_form_and_stem():
    scores = make_reward("meteor")(*zip(*PAIRS, strict=True))
    assert scores.tolist() == meteor_of_nltk(NoSynonyms())


def test_by_hand():
    reward = make_reward("meteor")
    # Five of five words (full stop included) in one run: 1 - 0.5 * (1 / 5) ** 3.
    assert reward(["the cats sat down ."], ["The cat sat down."]) == pytest.approx([1 - 0.5 / 5**3])
    # Two of two said words in two runs, of three: F = P R / (0.9 P + 0.1 R), and half is taken off.
    assert reward(["a c"], ["a b c"]) == pytest.approx([0.5 * (2 / 3) / (0.9 + 0.1 * 2 / 3)])
    assert reward(["sofa", "", ""], ["couch", "couch", ""]).tolist() == [0.0, 0.0, 0.0]


def test_with_wordnet_it_is_what_nltk_computes(wordnet, monkeypatch):
    scores = make_reward("meteor", options=MetricOptions(meteor_wordnet=str(wordnet)))(*zip(*PAIRS, strict=True))
    # nltk's own reader asks for two files more, and for other languages' data.
    (wordnet / "lexnames").write_text("".join(f"{number:02d}\tfile{number}\t1\n" for number in range(4)))
    (wordnet / "index.sense").write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(wordnet.parent.parent)])
    reader = WordNetCorpusReader(str(wordnet), omw_reader=())
    assert scores.tolist() == meteor_of_nltk(reader)
    for file in reader._data_file_map.values():  # nobody else closes them
        file.close()
    assert scores.sum() > sum(meteor_of_nltk(NoSynonyms())) + 0.5


def test_synonyms_by_hand(wordnet):
    reward = make_reward("meteor", options=MetricOptions(meteor_wordnet=str(wordnet)))
    # Each one word of one: 1 - 0.5. Plurals find their noun, regular or not.
    assert reward(["sofa", "couches", "men", "tür"], ["couch", "sofa", "man", "tor"]).tolist() == [0.5, 0.5, 0.5, 0.0]


def test_the_label_says_whether_synonyms_count(wordnet):
    (score,) = corpus_scores(["meteor"], ["a sofa"], ["a couch"]).values()
    assert score.label.startswith(f"METEOR (no synonyms), nltk {nltk.__version__}, NLTKWordTokenizer, lower-cased")
    (score,) = corpus_scores(["meteor"], ["a"], ["a"], MetricOptions(meteor_wordnet=str(wordnet))).values()
    assert score.label.startswith("METEOR (synonyms of WordNet 3.0), nltk ")


def test_wordnet_is_read_once(wordnet):
    options = MetricOptions(meteor_wordnet=str(wordnet))
    for _ in range(3):
        corpus_scores(["meteor"], ["a sofa"], ["a couch"], options)
    assert load_wordnet.cache_info().misses == 1


@pytest.mark.parametrize("missing", ["data.noun", "verb.exc", None])
def test_a_wrong_directory_is_told_what_it_lacks(wordnet, missing):
    directory = wordnet if missing else wordnet / "elsewhere"
    if missing:
        (wordnet / missing).unlink()
    message = rf"has no {missing or ', '.join(WORDNET_FILES)}. Give a directory with WordNet's files data.adj, "
    with pytest.raises(UserError, match=message):
        make_reward("meteor", options=MetricOptions(meteor_wordnet=str(directory)))
