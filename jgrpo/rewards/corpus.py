# SPDX-License-Identifier: Apache-2.0
"""Scores of a whole pass over a data set, as results are reported."""

import dataclasses
from collections.abc import Mapping, Sequence

from jgrpo.config import MetricOptions
from jgrpo.rewards.built_in import BUILT_IN
from jgrpo.rewards.overlap import DEFAULT_OPTIONS, corpus_bleu, corpus_chrf
from jgrpo.rewards.reward import make_reward
from jgrpo.rewards.wer import corpus_cer, corpus_wer
from model_port.errors import UserError


@dataclasses.dataclass(frozen=True)
class CorpusScore:
    """One metric of one pass.

    Attributes:
        value: percent (0..100; an error rate may exceed it); of a function of the user's, its mean as it is.
        label: how it was computed, enough to compute it again.
        lower_is_better: true of the error rates alone.
    """

    value: float
    label: str
    lower_is_better: bool = False


def _bleu(completions: Sequence[str], references: Sequence[str], options: MetricOptions) -> CorpusScore:
    score, signature = corpus_bleu(completions, references, options)
    return CorpusScore(score, f"BLEU {signature}")


def _chrf(completions: Sequence[str], references: Sequence[str], options: MetricOptions) -> CorpusScore:
    score, signature = corpus_chrf(completions, references)
    return CorpusScore(score, f"chrF2 {signature}")


def _wer(completions: Sequence[str], references: Sequence[str], options: MetricOptions) -> CorpusScore:
    label = "WER, all errors over all reference words, cased, NFC"
    return CorpusScore(100 * corpus_wer(completions, references), label, lower_is_better=True)


def _cer(completions: Sequence[str], references: Sequence[str], options: MetricOptions) -> CorpusScore:
    label = "CER, all errors over all reference characters, cased, NFC, white space collapsed"
    return CorpusScore(100 * corpus_cer(completions, references), label, lower_is_better=True)


# These pool the counts of all examples; every other metric is a mean over examples.
POOLED = {"bleu": _bleu, "chrf": _chrf, "wer": _wer, "cer": _cer}


def corpus_scores(
    names: Sequence[str],
    completions: Sequence[str],
    references: Sequence[str],
    options: MetricOptions = DEFAULT_OPTIONS,
    *,
    columns: Mapping[str, Sequence] | None = None,
) -> dict[str, CorpusScore]:
    """Score completions against one reference each, by every metric named.

    bleu and chrf are sacrebleu's corpus scores; wer and cer are all errors over all reference words or characters;
    the others are means of the rewards of the same name. What a metric reads from disk is read once in a process.

    Args:
        names: of the table BUILT_IN, or functions of yours as package.module:function.
        columns: further columns of the data set, for such functions.

    Raises:
        UserError: nothing to score, unequal lengths, or as make_reward and its components.
    """
    if not completions or len(completions) != len(references):
        raise UserError(
            f"corpus scores got {len(completions)} completions and {len(references)} references: "
            "give as many of one as of the other, and at least one."
        )
    found = {name: POOLED[name](completions, references, options) for name in names if name in POOLED}
    means = [name for name in names if name not in POOLED]
    if means:
        reward = make_reward(dict.fromkeys(means, 1.0), options=options)
        for name, values in reward.components(completions, references, **(columns or {})).items():
            ours = BUILT_IN.get(name)
            scale, label = (100, ours.label(options)) if ours else (1, f"mean over examples of {name}")
            found[name] = CorpusScore(scale * float(values.mean()), label)
    return {name: found[name] for name in names}
