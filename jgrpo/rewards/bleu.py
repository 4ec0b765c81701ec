"""BLEU by sacrebleu: per sentence as a reward, per corpus as a result."""

from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics import BLEU

from jgrpo.checks import check_types
from jgrpo.options import MetricOptions
from model_port.errors import UserError

# 13a, exponential smoothing, cased: the paper states no variant, and this is sacrebleu's own default.
DEFAULT_OPTIONS = MetricOptions()


def _variant(options: MetricOptions) -> dict[str, Any]:
    check_types(options, "metrics.")
    return {
        "tokenize": options.bleu_tokenize,
        "smooth_method": options.bleu_smooth,
        "lowercase": options.bleu_lowercase,
    }


class SentenceBleu:
    """Sentence BLEU in [0, 1], n-gram orders longer than the sentence left out.

    One scorer object serves every call: building it costs as much as scoring a sentence.
    """

    def __init__(self, options: MetricOptions = DEFAULT_OPTIONS):
        self._scorer = BLEU(effective_order=True, **_variant(options))

    def __call__(self, completion: str, reference: str) -> float:
        # sacrebleu gives 100.00000000000004 to identical text.
        return min(self._scorer.sentence_score(completion, [reference]).score / 100, 1.0)


def corpus_bleu(
    completions: Sequence[str], references: Sequence[str], options: MetricOptions = DEFAULT_OPTIONS
) -> tuple[float, str]:
    """Corpus BLEU in 0..100, one reference each, and the sacrebleu signature that says how it was computed.

    Raises:
        UserError: nothing to score, or unequal lengths.
    """
    if not completions or len(completions) != len(references):
        raise UserError(
            f"corpus BLEU got {len(completions)} completions and {len(references)} references: "
            "give as many of one as of the other, and at least one."
        )
    scorer = BLEU(**_variant(options))
    score = scorer.corpus_score(list(completions), [list(references)]).score
    return score, str(scorer.get_signature())
