# SPDX-License-Identifier: Apache-2.0
"""What XLA compiles for a run, counted."""

from typing import Any

import jax

# As jgrpo.programs.steps calls them; what else is compiled is small, and does not depend on the data.
PROGRAMS = ("encode", "rollout", "beam", "score", "update")
ASKED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """How many programs this process has asked of the compiler since this was made; those from disk count, too.

    A program is compiled for every combination of lengths it meets: the buckets of audio and prompts bound the number.
    """

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, seconds: float, **about: Any) -> None:
        name = about.get("fun_name", "").removeprefix("jit(").removesuffix(")")
        self.count += event == ASKED and name in PROGRAMS
