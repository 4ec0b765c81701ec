# SPDX-License-Identifier: Apache-2.0
"""Exact match."""

from jgrpo.rewards.wer import characters


def exact_match(completion: str, reference: str) -> float:
    """1 if the texts are the same, else 0. Case and punctuation count; runs of white space and Unicode form do not."""
    return float(characters(completion) == characters(reference))
