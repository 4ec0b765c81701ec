# SPDX-License-Identifier: Apache-2.0
"""A penalty for completions that come close to the length limit."""

import numpy as np
from jaxtyping import Float, Int

from model_port.errors import UserError


def overlong_penalty(
    lengths: Int[np.ndarray, "P G"], *, limit: int, buffer: int, penalty: float | int = 1.0
) -> Float[np.ndarray, "P G"]:
    """What to add to each reward: 0 up to limit - buffer tokens, then falling linearly to -penalty at the limit.

    A completion that was cut at the limit has its length, and so gets the full penalty.

    Args:
        lengths: in tokens, the end-of-sequence token included.

    Raises:
        UserError: a buffer that is empty or longer than the limit.

    Source: DAPO, arXiv 2503.14476, soft overlong punishment.

    >>> overlong_penalty(np.array([[6, 8, 9, 10]]), limit=10, buffer=4).tolist()
    [[0.0, -0.5, -0.75, -1.0]]
    """
    if not 0 < buffer <= limit:
        raise UserError(f"the overlong buffer is {buffer} tokens; it must lie between 1 and the limit of {limit}.")
    return penalty * np.minimum((limit - buffer - lengths.astype(np.float64)) / buffer, 0.0)
