# SPDX-License-Identifier: Apache-2.0
"""chrF by sacrebleu: overlap of character n-grams, kinder than BLEU to inflected and compound words.

chrF2 in both forms: character orders 1 to 6, recall weighted twice, cased.
"""

from collections.abc import Sequence

from sacrebleu.metrics import CHRF


class SentenceChrf:
    """Sentence chrF in [0, 1]."""

    def __init__(self):
        self._scorer = CHRF()

    def __call__(self, completion: str, reference: str) -> float:
        return min(self._scorer.sentence_score(completion, [reference]).score / 100, 1.0)


def corpus_chrf(completions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus chrF in 0..100, and the sacrebleu signature that says how it was computed."""
    scorer = CHRF()
    return scorer.corpus_score(list(completions), [list(references)]).score, str(scorer.get_signature())
