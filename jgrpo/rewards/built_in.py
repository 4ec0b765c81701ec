# SPDX-License-Identifier: Apache-2.0
"""The table of the rewards that have a name of their own.

nltk takes seconds to import and BERTScore's model takes memory: what only some rewards need is imported by those alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from jgrpo.config import MetricOptions
from jgrpo.rewards.overlap import SentenceBleu, SentenceChrf, exact_match, length_closeness
from jgrpo.rewards.wer import character_accuracy, word_accuracy
from model_port.errors import UserError

# A component: (completions, references, **columns) -> one finite number per example.
Component = Callable[..., Sequence[float] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """A reward of ours.

    Attributes:
        make: from the options to the component.
        label: how its mean over examples is computed, for those that are reported as such a mean.
    """

    make: Callable[[MetricOptions], Component]
    label: Callable[[MetricOptions], str] | None = None


def _each(score: Callable[[str, str], float]) -> Component:
    """A score of one example, as a component that needs no columns; equal examples are scored once."""

    def component(completions, references, **_):
        pairs = list(zip(completions, references, strict=True))
        scores = {pair: score(*pair) for pair in dict.fromkeys(pairs)}
        return [scores[pair] for pair in pairs]

    return component


def _rouge(kind: str, options: MetricOptions) -> Component:
    from jgrpo.rewards.rouge import Rouge

    return _each(Rouge(kind, options))


def _rouge_label(kind: str, options: MetricOptions) -> str:
    from jgrpo.rewards.rouge import rouge_label

    return rouge_label(kind, options)


def _meteor(options: MetricOptions) -> Component:
    from jgrpo.rewards.meteor import Meteor

    return _each(Meteor(options.meteor_wordnet))


def _meteor_label(options: MetricOptions) -> str:
    from jgrpo.rewards.meteor import meteor_label

    return meteor_label(options.meteor_wordnet)


def _load_bertscore(options: MetricOptions):
    from jgrpo.rewards.bertscore import load_bertscore

    if options.bertscore_model is None:
        raise UserError("bertscore needs a model: set metrics.bertscore_model to a directory of a BERT or RoBERTa.")
    return load_bertscore(options.bertscore_model, options.bertscore_layer)


def _bertscore(options: MetricOptions) -> Component:
    score = _load_bertscore(options)
    return lambda completions, references, **_: score(completions, references)


# All in [0, 1] but bertscore, which is at most 1 and in practice above 0. Built when asked for, so that each reward
# object owns its scorers; of what is costly to read (a model, WordNet) there is one in a process.
BUILT_IN = {
    "bleu": BuiltIn(lambda options: _each(SentenceBleu(options))),
    "chrf": BuiltIn(lambda options: _each(SentenceChrf())),
    "rouge1": BuiltIn(functools.partial(_rouge, "rouge1"), functools.partial(_rouge_label, "rouge1")),
    "rouge2": BuiltIn(functools.partial(_rouge, "rouge2"), functools.partial(_rouge_label, "rouge2")),
    "rougeL": BuiltIn(functools.partial(_rouge, "rougeL"), functools.partial(_rouge_label, "rougeL")),
    "meteor": BuiltIn(_meteor, _meteor_label),
    "bertscore": BuiltIn(_bertscore, lambda options: _load_bertscore(options).label),
    "wer": BuiltIn(lambda options: _each(word_accuracy)),
    "cer": BuiltIn(lambda options: _each(character_accuracy)),
    "exact": BuiltIn(
        lambda options: _each(exact_match),
        lambda options: "exact match, cased, NFC, white space collapsed, mean over examples",
    ),
    "length": BuiltIn(
        lambda options: _each(length_closeness),
        lambda options: "words of the shorter text over words of the longer one, mean over examples",
    ),
}
# These compute with JAX, and therefore in the process that owns the device.
ON_DEVICE = ("bertscore",)
