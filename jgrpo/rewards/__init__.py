"""Rewards: completions and references, as lists of text on the host, to one number per example."""

from jgrpo.rewards.bleu import BleuOptions, corpus_bleu
from jgrpo.rewards.reward import Reward, make_reward
from jgrpo.rewards.wer import corpus_wer

__all__ = ["BleuOptions", "Reward", "corpus_bleu", "corpus_wer", "make_reward"]
