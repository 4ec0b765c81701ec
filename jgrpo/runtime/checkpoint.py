# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: arrays by name and a JSON record, atomic, verified, with a fallback."""

import json
import logging
import os
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from model_port.errors import UserError
from model_port.paths import absolute, is_remote, room_for

log = logging.getLogger(__name__)

COMMITTED = "commit_success.txt"  # what Orbax writes last where a rename is not atomic


class Restored(NamedTuple):
    """What `RunCheckpoints.restore` gives back."""

    arrays: Any
    host: dict[str, Any]
    step: int


def saved_steps(directory: str | os.PathLike) -> list[int]:
    """Return the steps of the complete checkpoints in a directory of RunCheckpoints, in order; [] if it is absent."""
    named = [path for path in _entries(absolute(directory)) if path.name.isdigit()]
    return sorted(int(path.name) for path in named if not _is_unfinished(path))


class DamagedCheckpoint(Exception):
    """A committed checkpoint whose content is not what was saved."""


class RunCheckpoints:
    """The newest checkpoints of one run, in `directory/<step>/`.

    Saving copies the arrays to the host and writes in the background; a checkpoint appears under its name only when it
    is complete, which `wait` waits for. Whoever calls `wait` before counting the first step after a `save` has a newest
    checkpoint that is never more than `save_every` counted steps old.

    Each holds a sum of the bits of every array, so that a flipped bit, which storage may not report, is damage like a
    missing file. All processes of a run call every method, on a directory that they share.

    Args:
        directory: on a disk or gs://; made if absent. What an interrupted save left there is removed, aloud.
        keep: how many of the newest checkpoints to keep.
        save_every: `save` acts at multiples of this step, unless forced.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2, save_every: int = 1):
        if keep < 1 or save_every < 1:
            raise UserError(f"keep is {keep} and save_every is {save_every}; both must be at least 1")
        self._directory = absolute(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._save_every = save_every
        if jax.process_index() == 0:
            for path in _entries(self._directory):
                if _is_unfinished(path):
                    log.warning("%s is a checkpoint whose save was interrupted: removing it", path)
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, arrays: PyTree, host: Mapping[str, Any], *, force: bool = False) -> bool:
        """Begin to save after `step` finished steps, if it is a multiple of `save_every` or forced; else return False.

        Args:
            arrays: a tree of jax arrays, PRNG keys included; its buffers may be donated once this returns.
            host: what else the run needs to go on, strict JSON.

        A failure to write in the background is raised by the next `save`, `wait` or `close`. A step that is saved
        already stays as it is.
        """
        if not self.is_due(step, force=force):
            return False
        named = _named(arrays)
        record = {"arrays": _table(named, sums=_bit_sums(named)), "host": dict(host)}
        with room_for(self._directory / str(step)):
            self._checkpointer.save_async(step, named, force=True, custom_metadata={**record, "crc32": _crc(record)})
        return True

    def is_due(self, step: int, *, force: bool = False) -> bool:
        """Return whether `save` would act."""
        return (force or step % self._save_every == 0) and step != self.latest_step()

    def latest_step(self) -> int | None:
        """The newest step that is saved or being saved; None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore(self, abstract: PyTree) -> Restored:
        """Load the newest sound checkpoint.

        A damaged one is named in a warning, and the one before it is used; once that has succeeded, the damaged one is
        renamed to `damaged-<step>`, so that its step can be saved again.

        Args:
            abstract: the tree that was saved, with `jax.ShapeDtypeStruct` (or arrays) as leaves; each array is loaded
                straight into the sharding of its leaf.

        Raises:
            UserError: if there is no checkpoint, if none is sound, or if the newest sound one is of another model.
        """
        self.wait()
        steps = [checkpoint.step for checkpoint in reversed(self._checkpointer.checkpoints)]
        if not steps:
            raise UserError(f"there is no checkpoint in {self._directory}; start the run without resuming it")
        damaged = []
        for step in steps:
            try:
                restored = self._load(step, abstract)
            except DamagedCheckpoint as error:
                log.warning("checkpoint %s is damaged, trying the one before: %s", self._directory / str(step), error)
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return restored
        raise UserError(
            f"every checkpoint in {self._directory} is damaged (steps {', '.join(map(str, reversed(steps)))}); "
            "the log above says how. Put a sound copy there, or start over in another run directory."
        )

    def wait(self) -> None:
        """Return once everything that `save` began is on disk.

        Raises:
            UserError: the disk is full; the checkpoints before stay.
        """
        with room_for(self._directory):
            self._checkpointer.wait()

    def close(self) -> None:
        """Wait, then release what the checkpointer holds."""
        with room_for(self._directory):
            self._checkpointer.close()

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _load(self, step: int, abstract: PyTree) -> Restored:
        wanted = {name: _with_sharding(leaf) for name, leaf in _named(abstract).items()}
        record = self._record(step)
        saved = {name: {**entry, "sum": None} for name, entry in record["arrays"].items()}
        _check_same(saved, _table(wanted), where=self._directory / str(step))
        try:
            named = self._checkpointer.load(step, wanted)
        except Exception as error:  # Orbax and TensorStore raise bare Exception, ValueError, KeyError and more
            raise DamagedCheckpoint(f"{type(error).__name__}: {str(error)[:300]}") from error
        for name, total in _bit_sums(named).items():
            if total != record["arrays"][name]["sum"]:
                raise DamagedCheckpoint(f"the bits of {name} are not those that were saved")
        arrays = jax.tree.unflatten(jax.tree.structure(abstract), [named[name] for name in wanted])
        return Restored(arrays=arrays, host=record["host"], step=step)

    def _record(self, step: int) -> dict[str, Any]:
        """What `save` noted about the checkpoint, checked against its own checksum."""
        try:
            record = dict(self._checkpointer.metadata(step).custom_metadata)
            crc = record.pop("crc32")
        except Exception as error:  # as in _load
            raise DamagedCheckpoint(f"its metadata is unreadable: {type(error).__name__}: {error}") from error
        if crc != _crc(record):
            raise DamagedCheckpoint("its metadata is not what was saved")
        return record

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self._directory / f"damaged-{step}"
                while target.exists():
                    target = target.with_name(target.name + "-again")
                (self._directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._checkpointer.reload()


def _is_unfinished(checkpoint: epath.Path) -> bool:
    """Return whether the save of a checkpoint has not come to its end: a disk tells by the name, a bucket by a mark."""
    if is_remote(checkpoint):
        return checkpoint.name.isdigit() and not (checkpoint / COMMITTED).exists()
    return ".orbax-checkpoint-tmp" in checkpoint.name


def _entries(directory: epath.Path) -> list[epath.Path]:
    """Return what is in a directory; a bucket has none before there is something in it."""
    return sorted(directory.iterdir()) if directory.exists() else []


def _named(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path: a name says which parameter it is, whatever NamedTuple or nnx.State holds it."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    assert len(named) == len(paths), "two leaves have one dotted path"
    return named


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """The leaf without its content; on the first local device where it names no sharding."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _table(named: Mapping[str, Any], sums: Mapping[str, int] | None = None) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sum": sums[name] if sums else None}
        for name, leaf in named.items()
    }


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, where: epath.Path) -> None:
    """Raise a UserError naming the first parameter that differs between the checkpoint and the run."""

    def describe(entry):
        return f"{entry['dtype']}[{', '.join(map(str, entry['shape']))}]" if entry else "absent"

    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint {where} is of another model or configuration: {name} is {describe(saved.get(name))} "
                f"in the checkpoint and {describe(wanted.get(name))} in this run. Resume with the configuration that "
                "the checkpoint was made with, or choose another run directory."
            )


def _crc(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True, allow_nan=False).encode())


def _bit_sums(named: Mapping[str, jax.Array]) -> dict[str, int]:
    """For each array, the sum modulo 2**32 of its elements' bits.

    The order of a sum of integers does not matter: the same number comes out on any mesh and on every process.
    """
    groups: dict[frozenset, dict[str, jax.Array]] = {}
    for name, leaf in named.items():
        groups.setdefault(frozenset(leaf.sharding.device_set), {})[name] = leaf
    sums = {}
    for group in groups.values():
        sums.update(_sum_bits(group))
    return {name: int(np.asarray(sums[name])) for name in named}


@jax.jit
def _sum_bits(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype != jnp.bool_:
            leaf = jax.lax.bitcast_convert_type(
                leaf, {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
            )
        return jnp.sum(leaf, dtype=jnp.uint32)

    return {name: total(leaf) for name, leaf in named.items()}
