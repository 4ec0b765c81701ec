# SPDX-License-Identifier: Apache-2.0
"""ROUGE-1, ROUGE-2 and ROUGE-L as F-measures, by the package rouge-score."""

import functools
import logging
import unicodedata
from importlib.metadata import version

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from jgrpo.config import MetricOptions

logger = logging.getLogger(__name__)

# Texts whose words are kept: each is needed once per kind of ROUGE, and a reference once per member of its group.
_CACHED_TEXTS = 2**15
_LONGEST_UNSTEMMED = 3  # rouge-score stems longer words only
_MOST_SHOWN = 20


def _is_word_part(character: str) -> bool:
    """Whether it is a letter, a digit or a mark on one."""
    return unicodedata.category(character)[0] in "LNM"


class UnicodeTokenizer(Tokenizer):
    """Lower-cased runs of letters, digits and combining marks of any script, in NFC.

    Only punctuation, symbols and white space are lost. A script written without spaces yields one word per run.
    """

    def __init__(self, use_stemmer: bool = False):
        self._stemmer = PorterStemmer() if use_stemmer else None

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        text = unicodedata.normalize("NFC", text.lower())
        words = "".join(character if _is_word_part(character) else " " for character in text).split()
        if self._stemmer:
            words = [self._stemmer.stem(word) if len(word) > _LONGEST_UNSTEMMED else word for word in words]
        return words


class AsciiTokenizer(DefaultTokenizer):
    """rouge-score's own tokenizer: lower-cased runs of a-z and 0-9. Says once in a process that letters are lost."""

    warned = False

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        if not AsciiTokenizer.warned and not text.isascii():
            letters = unicodedata.normalize("NFC", text.lower())
            lost = sorted({letter for letter in letters if not letter.isascii() and _is_word_part(letter)})
            if lost:
                AsciiTokenizer.warned = True
                logger.warning(
                    "ROUGE's ascii tokenizer drops every letter but a-z and cuts words there; the first text concerned "
                    "lost %s. Set metrics.rouge_tokenizer=unicode to keep them.",
                    " ".join(lost[:_MOST_SHOWN]) + (" …" if len(lost) > _MOST_SHOWN else ""),
                )
        return super().tokenize(text)


class CachedTokenizer(Tokenizer):
    """Another tokenizer, asked only once for the words of a text."""

    def __init__(self, tokenizer: Tokenizer):
        self._split = functools.lru_cache(_CACHED_TEXTS)(tokenizer.tokenize)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return self._split(text)


TOKENIZERS = {"ascii": AsciiTokenizer, "unicode": UnicodeTokenizer}


@functools.lru_cache(1)
def shared_tokenizer(name: str, stemmer: bool) -> Tokenizer:
    """The tokenizer that all kinds of ROUGE with these options share, so that a text is split once for all."""
    return CachedTokenizer(TOKENIZERS[name](stemmer))


class Rouge:
    """One kind of ROUGE ("rouge1", "rouge2", "rougeL"), its F-measure in [0, 1]; 0 where either text has no word."""

    def __init__(self, kind: str, options: MetricOptions):
        self._kind = kind
        tokenizer = shared_tokenizer(options.rouge_tokenizer, options.rouge_stemmer)
        self._scorer = RougeScorer([kind], tokenizer=tokenizer)

    def __call__(self, completion: str, reference: str) -> float:
        return float(self._scorer.score(reference, completion)[self._kind].fmeasure)


def rouge_label(kind: str, options: MetricOptions) -> str:
    """How a ROUGE score is computed."""
    stemmer = "Porter" if options.rouge_stemmer else "none"
    return (
        f"{kind.replace('rouge', 'ROUGE-')} F1, rouge-score {version('rouge-score')} "
        f"tokenizer={options.rouge_tokenizer} stemmer={stemmer}, mean over examples"
    )
