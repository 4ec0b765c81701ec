# SPDX-License-Identifier: Apache-2.0
"""The order of a training stream: which example stands at each position, a pure function of the seed.

Several data sets are interleaved by their weights as evenly as can be, and each is reshuffled for every epoch of its
own, so a small one comes round more often. Nothing is counted up: any position is computed by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int

from jgrpo.data.examples import Examples

UNIT = 1 << 32  # weights become shares of it, in whole numbers: no rounding that grows with the position
FURTHER, MIXED = 1, 2  # what a seed derived from the run's is for


@dataclass(frozen=True)
class Source:
    """One data set of a mixture, and its share of the examples as a weight."""

    examples: Examples
    name: str = ""
    weight: float = 1.0


class Order:
    """Positions of an endless stream to examples, numbered through all sources.

    Args:
        counts: examples of each source.
        weights: of each source.
        seed: of the run.
        further: whether it is the order of the prompts beside the stream's own.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[int | float], *, seed: int, further: bool = False):
        self._starts = np.cumsum([0, *counts])
        self._shares = _shares(weights)
        if further:
            seed = derived_seed(seed, FURTHER)
        seeds = [seed, *(derived_seed(seed, MIXED, k) for k in range(1, len(counts)))]
        self._shuffled = [_shuffled(count, own, further) for count, own in zip(counts, seeds, strict=True)]

    def __call__(self, positions: Sequence[int] | range) -> Int[np.ndarray, " N"]:
        """Return the examples at these positions."""
        return np.array([self._at(position) for position in positions])

    def _at(self, position: int) -> int:
        source = 0
        # Source k takes its share of the positions that those before it have left, evenly spread.
        for share in self._shares:
            before, after = position * share // UNIT, (position + 1) * share // UNIT
            if after > before:
                position = before
                break
            position -= before
            source += 1
        return int(self._starts[source]) + int(self._shuffled[source][position])


def _shares(weights: Sequence[int | float]) -> list[int]:
    """Return the share in UNIT of each source but the last of the positions left by those before it."""
    left = [sum(weights[k:]) for k in range(len(weights))]
    return [round(weight / rest * UNIT) for weight, rest in zip(weights[:-1], left[:-1], strict=True)]


def _shuffled(count: int, seed: int, further: bool) -> grain.MapDataset:
    examples = grain.MapDataset.range(count)
    # Two ways to name a seed, and so two orders of the same one.
    shuffled = examples.shuffle(seed=seed) if further else examples.seed(seed).shuffle()
    return shuffled.repeat()


def derived_seed(*parts: int) -> int:
    """Return a seed of 32 bits that depends on all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
