"""Our side of the conversation with a peer: a process in the peer's environment that works when asked, and only then.

Requests and answers are JSON objects, one a line; `answers.py` is the other side.
"""

import json
import os
import queue
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model_port.errors import UserError

START_SECONDS = 240.0  # imports, weights and what the peer compiles when it starts
ANSWER_SECONDS = 240.0
SHOWN_LINES = 12  # of a log, in a message


class Peer:
    """A peer's process; a context manager, which ends it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        settings: dict[str, Any],
        *,
        log: Path,
        cwd: Path,
        start_seconds: float = START_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
    ):
        """Start the process, hand it its settings and wait until it is ready; `ready` is what it then said.

        Raises:
            UserError: it cannot be started, ends, is too slow or answers nonsense.
        """
        self.name, self.log, self._seconds = name, log, answer_seconds
        try:
            with open(log, "wb") as file:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                    cwd=cwd,
                    env=os.environ | {"PYTHONPATH": str(cwd), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
                )
        except OSError as error:
            raise UserError(f"the peer {name} cannot be started by {command[0]}: {error}") from error
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.ready = self.ask(start_seconds, **settings)
        except UserError:
            self.close()
            raise

    def ask(self, seconds: float | None = None, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Args:
            seconds: to wait for it, if not the usual.

        Raises:
            UserError: the peer says what went wrong, or ends, is too slow or answers nonsense.
        """
        seconds = self._seconds if seconds is None else seconds
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            text = self._lines.get(timeout=seconds)
        except BrokenPipeError:
            text = None
        except queue.Empty:
            self._process.kill()
            raise UserError(f"the peer {self.name} gave no answer within {seconds:g} s; {self._end_of_log()}") from None
        if text is None:
            raise UserError(f"the peer {self.name} ended with status {self._process.wait()}; {self._end_of_log()}")
        try:
            answer = json.loads(text)
        except json.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"the peer {self.name} answered {text[:80]!r}, not a JSON object; {self._end_of_log()}")
        if "error" in answer:
            raise UserError(f"the peer {self.name} failed: {answer['error']}; {self._end_of_log()}")
        return answer

    def close(self) -> None:
        """End the process."""
        for end in (self._process.stdin.close, lambda: self._process.wait(5)):
            try:
                end()
            except BrokenPipeError:
                pass
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _read(self) -> None:
        try:
            for text in self._process.stdout:
                self._lines.put(text)
        except ValueError:  # closed while reading
            pass
        self._lines.put(None)

    def _end_of_log(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        return f"its log {self.log} " + ("is empty" if not lines else "ends:\n  " + "\n  ".join(lines))
