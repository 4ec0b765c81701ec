# SPDX-License-Identifier: Apache-2.0
"""METEOR by nltk: unigrams aligned by form, then by Porter stem, then, given WordNet's files, by synonym.

Words are those of nltk's NLTKWordTokenizer, which needs no download, then lower-cased. On a text of one sentence that
is what Hugging Face's `evaluate` does; in a longer one a full stop inside the text stays on its word, where `evaluate`
first cuts sentences with a downloaded model.
"""

import functools
import io
import weakref
from importlib.metadata import version
from pathlib import Path

import nltk
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import single_meteor_score

from model_port.errors import UserError

_KINDS = ("adj", "adv", "noun", "verb")
WORDNET_FILES = tuple(f"{stem}.{kind}" for stem in ("data", "index") for kind in _KINDS) + tuple(
    f"{kind}.exc" for kind in _KINDS
)
_LEXICOGRAPHER_FILES = 45


class NoSynonyms:
    """Stands in for WordNet: it knows no word."""

    def synsets(self, word: str) -> list:
        """Return no sense of any word."""
        return []


class WordNet(WordNetCorpusReader):
    """nltk's reader on any directory of WordNet's files, without what METEOR does not ask for."""

    def open(self, file: str):
        """Open a file; the names of the lexicographers' files are invented, Debian's packages leave them out."""
        if file == "lexnames":
            return io.StringIO("".join(f"{number} file{number} 0\n" for number in range(_LEXICOGRAPHER_FILES)))
        stream = super().open(file)
        weakref.finalize(self, stream.close)  # the reader keeps some open and closes none
        return stream

    def map_wn(self, version: str = "wordnet") -> None:
        """Map nothing: other languages' wordnets, which this is for, are not used."""
        return None


@functools.lru_cache(1)
def load_wordnet(directory: str) -> WordNet:
    """Read WordNet's index, once for all that ask for the same directory; takes 2 s.

    Raises:
        UserError: a file is missing.
    """
    path = Path(directory).absolute()
    missing = [name for name in WORDNET_FILES if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"metrics.meteor_wordnet is {directory!r}, which has no {', '.join(missing)}. Give a directory with "
            f"WordNet's files {', '.join(WORDNET_FILES)} (Debian: /usr/share/wordnet of the package wordnet-base), or "
            "leave it out for METEOR without synonyms."
        )
    # nltk reads no file outside the directories listed here.
    if str(path) not in nltk.data.path:
        nltk.data.path.append(str(path))
    # Anything but None, which makes the reader warn that it knows English only.
    return WordNet(str(path), omw_reader=())


class Meteor:
    """METEOR in [0, 1], alpha 0.9, beta 3, gamma 0.5; 0 where no word matches.

    Args:
        wordnet: directory of WordNet's files; None matches no synonyms.
    """

    def __init__(self, wordnet: str | None = None):
        self._wordnet = NoSynonyms() if wordnet is None else load_wordnet(wordnet)
        self._split = NLTKWordTokenizer().tokenize

    def __call__(self, completion: str, reference: str) -> float:
        return single_meteor_score(self._split(reference), self._split(completion), wordnet=self._wordnet)


def meteor_label(wordnet: str | None) -> str:
    """How a METEOR score is computed."""
    if wordnet is None:
        synonyms = "(no synonyms)"
    else:
        synonyms = f"(synonyms of WordNet {load_wordnet(wordnet).get_version()})"
    return f"METEOR {synonyms}, nltk {version('nltk')}, NLTKWordTokenizer, lower-cased, mean over examples"
