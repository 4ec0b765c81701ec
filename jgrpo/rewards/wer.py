# SPDX-License-Identifier: Apache-2.0
"""Word and character error rates, as rewards (1 - rate) and as corpus results.

Case and punctuation count; Unicode form (NFC is compared) and runs of white space do not.
"""

import unicodedata
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from model_port.errors import UserError


def words(text: str) -> list[str]:
    """What white space separates."""
    return unicodedata.normalize("NFC", text).split()


def characters(text: str) -> str:
    """Code points, one space between words."""
    return " ".join(words(text))


def edit_distance(said: Sequence, wanted: Sequence) -> int:
    """Fewest substitutions, insertions and deletions that turn one sequence into the other.

    >>> edit_distance("kitten", "sitting"), edit_distance("", "abc"), edit_distance(["a", "b"], ["b"])
    (3, 3, 1)
    """
    return Levenshtein.distance(said, wanted)


def word_errors(completion: str, reference: str) -> int:
    """Edit distance in words."""
    return edit_distance(words(completion), words(reference))


def _accuracy(split: Callable[[str], Sequence], completion: str, reference: str) -> float:
    said, wanted = split(completion), split(reference)
    if not wanted:
        return float(not said)
    return max(0.0, 1.0 - edit_distance(said, wanted) / len(wanted))


def word_accuracy(completion: str, reference: str) -> float:
    """1 - WER, not below 0. An empty reference is matched only by an empty completion."""
    return _accuracy(words, completion, reference)


def character_accuracy(completion: str, reference: str) -> float:
    """1 - CER, not below 0. An empty reference is matched only by an empty completion."""
    return _accuracy(characters, completion, reference)


def _corpus_rate(
    split: Callable[[str], Sequence], metric: str, unit: str, completions: Sequence[str], references: Sequence[str]
) -> float:
    if len(completions) != len(references):
        raise UserError(f"corpus {metric} got {len(completions)} completions and {len(references)} references.")
    wanted = list(map(split, references))
    total = sum(map(len, wanted))
    if total == 0:
        raise UserError(f"corpus {metric} needs a reference {unit}: got {len(references)} references without any.")
    return sum(map(edit_distance, map(split, completions), wanted)) / total


def corpus_wer(completions: Sequence[str], references: Sequence[str]) -> float:
    """All word errors over all reference words: 0 is perfect, above 1 is possible.

    Raises:
        UserError: unequal lengths, or no reference word.
    """
    return _corpus_rate(words, "WER", "word", completions, references)


def corpus_cer(completions: Sequence[str], references: Sequence[str]) -> float:
    """All character errors over all reference characters, as `corpus_wer`."""
    return _corpus_rate(characters, "CER", "character", completions, references)
