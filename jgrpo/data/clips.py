# SPDX-License-Identifier: Apache-2.0
"""The features of examples as they are asked for, and what is done where they cannot be read."""

import threading

import numpy as np
from jaxtyping import Float

from jgrpo.data.examples import Examples
from model_port.errors import UserError

Features = list[Float[np.ndarray, "_ M"]]


class ClipReader:
    """Reads the clips of examples, from several threads at once.

    Args:
        cache: whether features are kept in memory.
        max_unreadable: how many examples may be unreadable before `attempt` gives up.
    """

    def __init__(self, examples: Examples, *, cache: bool, max_unreadable: int):
        self._examples = examples
        self._kept: dict[int, Features] | None = {} if cache else None
        self._most = max_unreadable
        self._faults: dict[int, str] = {}
        self._lock = threading.Lock()

    def read(self, index: int) -> Features:
        """Return the features of an example's clips.

        Raises:
            UserError: a clip that cannot be read.
        """
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        features = self._examples.features(index)
        if self._kept is not None:
            self._kept[index] = features
        return features

    def attempt(self, index: int) -> Features | str:
        """Return the same, or why it cannot be had.

        Raises:
            UserError: there are more unreadable examples than are allowed; it names them.
        """
        if index not in self._faults:
            try:
                return self.read(index)
            except UserError as error:
                with self._lock:
                    self._faults[index] = str(error)
        with self._lock:
            # Also for one that another thread has found: its batch may be later than this one.
            if len(self._faults) > self._most:
                raise self._too_many()
        return self._faults[index]

    def _too_many(self) -> UserError:
        count = len(self._faults)
        lines = [f"  {self._examples.where(index)}: {fault}" for index, fault in sorted(self._faults.items())]
        head = (
            f"{count} example{'s' if count > 1 else ''} cannot be read and data.max_unreadable is {self._most}; "
            "restore or remove what is named here, or allow more:"
        )
        return UserError("\n".join([head, *lines]))
