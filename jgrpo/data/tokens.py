# SPDX-License-Identifier: Apache-2.0
"""Token rows in flat arrays: texts that many examples share are tokenized and held once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Int

CHUNK = 4096  # texts tokenized at a time: bounds the memory of tokens as Python numbers


@dataclass(frozen=True)
class TokenRows:
    """N rows of tokens.

    Attributes:
        values: the tokens of all distinct rows, one after the other.
        bounds: where each distinct row begins in `values`, and the end.
        which: the distinct row of each of the N.
    """

    values: Int[np.ndarray, " tokens"]
    bounds: Int[np.ndarray, " ends"]
    which: Int[np.ndarray, " N"]

    @classmethod
    def of(cls, texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]]) -> "TokenRows":
        """Tokenize texts."""
        numbers: dict[str, int] = {}
        which = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts), np.int32, len(texts))
        distinct, values, lengths = list(numbers), [np.empty(0, np.int32)], [0]
        for start in range(0, len(distinct), CHUNK):
            rows = encode(distinct[start : start + CHUNK])
            lengths.extend(map(len, rows))
            values.append(np.fromiter(chain.from_iterable(rows), np.int32))
        return cls(np.concatenate(values), np.cumsum(lengths, dtype=np.int64), which)

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> Int[np.ndarray, " _"]:
        row = self.which[index]
        return self.values[self.bounds[row] : self.bounds[row + 1]]

    def lengths(self, *, without: int | None = None) -> Int[np.ndarray, " N"]:
        """Return the tokens of each row, those equal to `without` not counted."""
        counted = np.ones(len(self.values), np.int64) if without is None else self.values != without
        sums = np.concatenate([[0], np.cumsum(counted, dtype=np.int64)])[self.bounds]
        return np.diff(sums)[self.which]

    def take(self, indices: Int[np.ndarray, " K"]) -> "TokenRows":
        """Return these rows."""
        return TokenRows(self.values, self.bounds, self.which[indices])


def join_rows(parts: Sequence[TokenRows]) -> TokenRows:
    """Return the rows of all parts, one part after the other."""
    before = np.cumsum([0, *(len(part.bounds) - 1 for part in parts)])
    tokens = np.cumsum([0, *(len(part.values) for part in parts)])
    ends = [part.bounds[1:] + shift for part, shift in zip(parts, tokens[:-1], strict=True)]
    which = [part.which + np.int32(shift) for part, shift in zip(parts, before[:-1], strict=True)]
    values = np.concatenate([part.values for part in parts])
    return TokenRows(values, np.concatenate([[0], *ends]), np.concatenate(which))
