# SPDX-License-Identifier: Apache-2.0
"""What two texts have in common, without a model: BLEU and chrF by sacrebleu, exact match, closeness of lengths.

BLEU and chrF are scored per sentence as a reward, per corpus as a result. chrF is kinder to inflected and compound
words: chrF2 in both forms, character orders 1 to 6, recall weighted twice, cased.
"""

from collections.abc import Sequence

from sacrebleu.metrics import BLEU, CHRF

from jgrpo.config import MetricOptions
from jgrpo.config.checks import check_types
from jgrpo.rewards.wer import characters
from model_port.errors import UserError

# 13a, exponential smoothing, cased: the paper states no variant, and this is sacrebleu's own default.
DEFAULT_OPTIONS = MetricOptions()


def _scorer(options: MetricOptions, *, effective_order: bool) -> BLEU:
    check_types(options, "metrics.")
    try:
        return BLEU(
            tokenize=options.bleu_tokenize,
            smooth_method=options.bleu_smooth,
            lowercase=options.bleu_lowercase,
            effective_order=effective_order,
        )
    except (ImportError, RuntimeError, OSError) as error:
        # What a tokenizer needs that is not installed or cannot be downloaded; sacrebleu says it in several lines.
        reason = " ".join(str(error).split())
        raise UserError(f"metrics.bleu_tokenize {options.bleu_tokenize!r} cannot be used: {reason}") from error


class SentenceBleu:
    """Sentence BLEU in [0, 1], n-gram orders longer than the sentence left out.

    One scorer object serves every call: building it costs as much as scoring a sentence.
    """

    def __init__(self, options: MetricOptions = DEFAULT_OPTIONS):
        self._scorer = _scorer(options, effective_order=True)

    def __call__(self, completion: str, reference: str) -> float:
        # sacrebleu gives 100.00000000000004 to identical text.
        return min(self._scorer.sentence_score(completion, [reference]).score / 100, 1.0)


def corpus_bleu(
    completions: Sequence[str], references: Sequence[str], options: MetricOptions = DEFAULT_OPTIONS
) -> tuple[float, str]:
    """Corpus BLEU in 0..100, one reference each, and the sacrebleu signature that says how it was computed.

    Raises:
        UserError: nothing to score, unequal lengths, or a tokenizer that lacks what it needs.
    """
    if not completions or len(completions) != len(references):
        raise UserError(
            f"corpus BLEU got {len(completions)} completions and {len(references)} references: "
            "give as many of one as of the other, and at least one."
        )
    scorer = _scorer(options, effective_order=False)
    score = scorer.corpus_score(list(completions), [list(references)]).score
    return score, str(scorer.get_signature())


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


def exact_match(completion: str, reference: str) -> float:
    """1 if the texts are the same, else 0. Case and punctuation count; runs of white space and Unicode form do not."""
    return float(characters(completion) == characters(reference))


def length_closeness(completion: str, reference: str) -> float:
    """Words of the shorter text over words of the longer one, in [0, 1]; 1 if both are empty.

    It keeps completions from growing or shrinking while another component is trained.

    >>> length_closeness("one two", "one two three four"), length_closeness("a b", ""), length_closeness("", " ")
    (0.5, 0.0, 1.0)
    """
    shorter, longer = sorted((len(completion.split()), len(reference.split())))
    return shorter / longer if longer else 1.0
