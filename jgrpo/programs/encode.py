# SPDX-License-Identifier: Apache-2.0
"""The encoder output of a batch: computed for it, or kept from one pass over the data while the encoder is frozen."""

import jax
import numpy as np
from jax.sharding import Mesh

from jgrpo.data.pipeline import PromptBatch, PromptData
from jgrpo.programs.steps import Programs
from jgrpo.runtime.rows import fetch, gather, place
from model_port.batch import Batch
from model_port.params import Params


class ClipEncoder:
    """Gives the encoder output [P, C, A, E] of batches.

    What is kept was computed in the order of the data, whatever order it is used in, so a run that is killed and goes
    on sees the same numbers.
    """

    def __init__(self, programs: Programs, frozen: Params, mesh: Mesh):
        self._programs = programs
        self._frozen = frozen
        self._mesh = mesh
        self._kept: dict[PromptData, list[np.ndarray]] = {}

    def keep(self, params: Params, data: PromptData) -> None:
        """Encode every clip of `data` now and hold the result in host memory."""
        rows: list[np.ndarray] = []
        for prompts in data.epoch():
            encoded = self(params, data, prompts, place(prompts.batch, self._mesh))
            rows.extend(gather(fetch(encoded), self._mesh)[: len(data) - len(rows)])  # the rest fills the batch
        self._kept[data] = rows

    def __call__(self, params: Params, data: PromptData, prompts: PromptBatch, batch: Batch) -> jax.Array:
        """Return the encoder output of a batch of `data`; `batch` is its arrays on the mesh."""
        kept = self._kept.get(data)
        if kept is None:
            return self._programs.encode(params, self._frozen, batch)
        frames = batch.features.shape[2]
        return place(np.stack([_to_frames(kept[index], frames) for index in prompts.indices]), self._mesh)


def _to_frames(row: np.ndarray, frames: int) -> np.ndarray:
    """Pad or cut [C, A, E] to `frames`; past a clip's length there are only zeros."""
    if row.shape[1] >= frames:
        return row[:, :frames]
    return np.pad(row, ((0, 0), (0, frames - row.shape[1]), (0, 0)))
