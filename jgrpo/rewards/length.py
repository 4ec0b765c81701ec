# SPDX-License-Identifier: Apache-2.0
"""Closeness of lengths: keeps completions from growing or shrinking while another component is trained."""


def length_closeness(completion: str, reference: str) -> float:
    """Words of the shorter text over words of the longer one, in [0, 1]; 1 if both are empty.

    >>> length_closeness("one two", "one two three four"), length_closeness("a b", ""), length_closeness("", " ")
    (0.5, 0.0, 1.0)
    """
    shorter, longer = sorted((len(completion.split()), len(reference.split())))
    return shorter / longer if longer else 1.0
