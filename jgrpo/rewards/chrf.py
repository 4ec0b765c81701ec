"""chrF by sacrebleu: overlap of character n-grams, kinder than BLEU to inflected and compound words."""

from sacrebleu.metrics import CHRF


class SentenceChrf:
    """Sentence chrF2 (character orders 1 to 6, recall weighted twice, cased) in [0, 1]."""

    def __init__(self):
        self._scorer = CHRF()

    def __call__(self, completion: str, reference: str) -> float:
        return min(self._scorer.sentence_score(completion, [reference]).score / 100, 1.0)
