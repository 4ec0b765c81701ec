"""A peer's side of the conversation: one JSON object a line comes in, one goes out. Standard library only.

What the peer's libraries print goes to standard error, so that the answers stay clean.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


class Line:
    """Standard input and output, kept for requests and answers alone."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def take(self) -> dict[str, Any] | None:
        """Return the next request; None when there are no more."""
        text = sys.stdin.readline()
        return json.loads(text) if text else None

    def answer(self, **values: Any) -> None:
        """Send an answer."""
        self._out.write(json.dumps(values) + "\n")


def serve(line: Line, works: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """Answer every {"do": name} by what that work returns, until the requests end."""
    while (request := line.take()) is not None:
        line.answer(**works[request["do"]]())


def run_side(side: Callable[[Line, dict[str, Any]], None]) -> None:
    """Run a peer's side: `side(line, settings)`, the settings being the first request; an error becomes an answer."""
    line = Line()
    try:
        side(line, line.take() or {})
    except BaseException as error:
        traceback.print_exc()
        line.answer(error=f"{type(error).__name__}: {error}")
        sys.exit(1)
