# SPDX-License-Identifier: Apache-2.0
"""Rewards and results: completions and references, as lists of text on the host, to numbers."""

from jgrpo.rewards.built_in import BUILT_IN
from jgrpo.rewards.corpus import CorpusScore, corpus_scores
from jgrpo.rewards.overlap import corpus_bleu
from jgrpo.rewards.pool import RewardPool
from jgrpo.rewards.reward import Reward, make_reward
from jgrpo.rewards.wer import corpus_cer, corpus_wer

__all__ = [
    "BUILT_IN",
    "CorpusScore",
    "Reward",
    "RewardPool",
    "corpus_bleu",
    "corpus_cer",
    "corpus_scores",
    "corpus_wer",
    "make_reward",
]
