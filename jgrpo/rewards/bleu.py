"""BLEU by sacrebleu: per sentence as a reward, per corpus as a result."""

import dataclasses
from collections.abc import Sequence

from sacrebleu.metrics import BLEU

from model_port.errors import UserError

# Those of sacrebleu that need neither a download nor another package.
TOKENIZERS = ("13a", "intl", "char", "zh", "none")
SMOOTH_METHODS = ("exp", "floor", "add-k", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BleuOptions:
    """The variants of BLEU that change its value; they differ most on short answers.

    Attributes:
        tokenize: one of TOKENIZERS.
        smooth_method: one of SMOOTH_METHODS. Without smoothing a sentence lacking one n-gram order scores 0.
        lowercase: ignore case.

    Raises:
        UserError: on construction, for an unknown tokenizer or smoothing method.
    """

    tokenize: str = "13a"
    smooth_method: str = "exp"
    lowercase: bool = False

    def __post_init__(self):
        for what, allowed in (("tokenize", TOKENIZERS), ("smooth_method", SMOOTH_METHODS)):
            value = getattr(self, what)
            if value not in allowed:
                raise UserError(f"BLEU {what} {value!r} is unknown: use one of {', '.join(allowed)}.")


# 13a, exponential smoothing, cased: the paper states no variant, and this is sacrebleu's own default.
DEFAULT_BLEU = BleuOptions()


class SentenceBleu:
    """Sentence BLEU in [0, 1], n-gram orders longer than the sentence left out.

    One scorer object serves every call: building it costs as much as scoring a sentence.
    """

    def __init__(self, options: BleuOptions = DEFAULT_BLEU):
        self._scorer = BLEU(effective_order=True, **dataclasses.asdict(options))

    def __call__(self, completion: str, reference: str) -> float:
        # sacrebleu gives 100.00000000000004 to identical text.
        return min(self._scorer.sentence_score(completion, [reference]).score / 100, 1.0)


def corpus_bleu(
    completions: Sequence[str], references: Sequence[str], options: BleuOptions = DEFAULT_BLEU
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
    scorer = BLEU(**dataclasses.asdict(options))
    score = scorer.corpus_score(list(completions), [list(references)]).score
    return score, str(scorer.get_signature())
