"""Exact match."""

import unicodedata


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(completion: str, reference: str) -> float:
    """1 if the texts are the same, else 0. Case and punctuation count; runs of white space and Unicode form do not."""
    return float(_normalise(completion) == _normalise(reference))
