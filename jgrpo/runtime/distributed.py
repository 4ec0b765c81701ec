# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: joining, agreeing that all of them run the same thing, and leaving in haste."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jgrpo.about import code_digest, versions
from jgrpo.config import DistributedOptions
from jgrpo.runtime.stop import Stopped
from model_port.errors import UserError

MAX_SHOWN = 5
# What a collective says when the process at its other end has died.
PEER_GONE = ("Connection reset by peer", "Connection closed by peer", "Socket closed", "Broken pipe")
GRACE_SECONDS = 5  # of ours before JAX's own deadline, whose message says nothing about what to do


@contextlib.contextmanager
def joined(options: DistributedOptions) -> Iterator[None]:
    """Run what is inside as one of the processes of `join`.

    Where it fails in one of several processes, that one ends at once with the message: the others wait for it, and find
    out by its absence. A run that all processes stop together ends in order.
    """
    join(options)
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if jax.distributed.is_initialized():
            sys.stderr.write(_last_words(error))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2 if isinstance(error, UserError) else 1)
        raise


def _last_words(error: BaseException) -> str:
    """Return what a process says that ends with an error."""
    if isinstance(error, UserError):
        return f"error: {error}\n"
    if any(sign in str(error) for sign in PEER_GONE):
        reason = str(error).splitlines()[0][:200]
        return (
            f"error: another process of this run is gone ({reason}); its own log says why. Start the same command on "
            "all hosts again: the run goes on from its last checkpoint.\n"
        )
    return "".join(traceback.format_exception(error))


def join(options: DistributedOptions) -> None:
    """Make this process one of several; the first thing a program does, before it touches a device.

    On a TPU slice the environment says who the others are. Elsewhere all three options say it: HOST:PORT of process 0,
    their number and this one's. Without either the process is alone.

    Raises:
        UserError: options that do not say it. If a process is missing after `start_timeout` seconds, this one ends with
            a message and status 3: JAX has no way back from there.
    """
    given = {name: getattr(options, name) for name in ("coordinator_address", "num_processes", "process_id")}
    if not _check(given) and not on_tpu():
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is jgrpo.runtime.stop's to answer
    if given["coordinator_address"]:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    met = _announce_absence(options)
    jax.distributed.initialize(
        **given,
        initialization_timeout=options.start_timeout + GRACE_SECONDS,
        heartbeat_timeout_seconds=options.heartbeat_timeout,
    )
    met.cancel()


def on_tpu() -> bool:
    """Whether this machine has TPU chips that JAX will use; known without touching them."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return "tpu" in wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None


def check_agreement(config: Any) -> None:
    """Check that all processes run the same code, config and versions as process 0.

    Raises:
        UserError: in every process, with what differs and where.
    """
    if jax.process_count() == 1:
        return
    tables = _all_texts(json.dumps(_facts(config)))
    first, faults = json.loads(tables[0]), []
    for process, text in enumerate(tables[1:], start=1):
        table = json.loads(text)
        names = [name for name in {**first, **table} if first.get(name) != table.get(name)]
        faults += [
            f"process {process}: {name} is {table.get(name)!r}, process 0 has {first.get(name)!r}" for name in names
        ]
    if faults:
        rest = [f"and {len(faults) - MAX_SHOWN} more"] if len(faults) > MAX_SHOWN else []
        lines = "\n  ".join([*faults[:MAX_SHOWN], *rest])
        raise UserError(f"the processes of this run are not alike; bring all hosts to the same state:\n  {lines}")


def _check(given: Mapping[str, Any]) -> bool:
    """Return whether the options name other processes."""
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return False
    if missing:
        names = ", ".join(f"--distributed.{name.replace('_', '-')}" for name in missing)
        raise UserError(f"to run as one of several processes, give {names} as well")
    address, count, own = given.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"distributed.coordinator_address is {address!r}; give HOST:PORT of process 0")
    if count < 1 or not 0 <= own < count:
        raise UserError(
            f"distributed.process_id is {own} and num_processes is {count}; process ids are 0 to num_processes - 1"
        )
    return True


def _announce_absence(options: DistributedOptions) -> threading.Timer:
    """Say what is wrong and end the process unless the timer is cancelled in time."""

    def end():
        whom = options.coordinator_address or "as the TPU environment names it"
        own = "?" if options.process_id is None else options.process_id
        sys.stderr.write(
            f"error: after {options.start_timeout} s not all processes of this run have met (coordinator: {whom}; this "
            f"is process {own} of {options.num_processes or '?'}). Start the same command on every host, each with its "
            "own process id, and let them reach the coordinator's port; --distributed.start-timeout waits longer.\n"
        )
        sys.stderr.flush()
        os._exit(3)

    timer = threading.Timer(options.start_timeout, end)
    timer.daemon = True
    timer.start()
    return timer


def _facts(config: Any) -> dict[str, str]:
    """Return what must be alike everywhere, as {name: text}."""
    options = {**dataclasses.asdict(config), "distributed": None}
    return {
        **versions(),
        "code": code_digest(),
        **{f"config {name}": json.dumps(value) for name, value in options.items()},
    }


def _all_texts(text: str) -> list[str]:
    """Return the texts of all processes."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(np.asarray(rows), sizes, strict=True)]
