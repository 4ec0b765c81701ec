# SPDX-License-Identifier: Apache-2.0
"""Rows of prompts between host and device: which of them a process holds, there and back, and all of them together.

The prompt axis of a batch is split over the mesh axes data and fsdp. A process holds the rows of its devices; where the
tensor axis reaches over several processes, these hold the same rows.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from model_port.partition import batch_sharding


def own_rows(mesh: Mesh, count: int) -> Int[np.ndarray, " N"]:
    """Return which of `count` rows, a multiple of data x fsdp, this process holds, rising."""
    return rows_of(mesh, count, jax.process_index())


def rows_of(mesh: Mesh, count: int, process: int) -> Int[np.ndarray, " N"]:
    """Return which of `count` rows the process of that index holds, rising."""
    owner = np.vectorize(lambda device: device.process_index)(mesh.devices)
    shards = np.flatnonzero((owner == process).any(-1).reshape(-1))
    size = count // (owner.size // owner.shape[-1])
    return (shards[:, None] * size + np.arange(size)).reshape(-1)


def place(tree, mesh: Mesh):
    """Put host arrays (or PRNG keys) whose first axis is prompts on the mesh; every process gives its own rows."""
    sharding = batch_sharding(mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held = len(own_rows(mesh, shards))

    def put(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        x = np.asarray(x)
        count = len(x) // held * shards
        # The position of a row of the whole among the rows here.
        position = {row: i for i, row in enumerate(own_rows(mesh, count).tolist())}

        def part(index):
            start, stop, _ = index[0].indices(count)
            return x[position[start] : position[start] + stop - start]

        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


def fetch(tree):
    """Bring arrays whose first axis is prompts to the host, each process its own rows: the reverse of `place`."""

    def rows(x):
        # Devices that differ in the tensor axis alone hold the same rows.
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(rows, tree)


def gather(tree, mesh: Mesh):
    """Return host arrays whose first axis is prompts with the rows of all processes, in the order of the whole.

    Of a row that several processes hold, the first process's values count, so that all of them go on with the same.
    """
    if jax.process_count() == 1:
        return tree

    def rows(x):
        # As bytes: JAX would round float64.
        flat = np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8)
        parts = np.asarray(multihost_utils.process_allgather(flat))
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        count = len(x) // len(own_rows(mesh, shards)) * shards
        whole = np.empty((count, flat.shape[1]), np.uint8)
        for process in reversed(range(jax.process_count())):
            held = rows_of(mesh, count, process)
            whole[held] = parts[process][: len(held)]
        return whole.view(x.dtype).reshape(count, *x.shape[1:])

    return jax.tree.map(rows, tree)


def sum_over_rows(count: int, mesh: Mesh) -> int:
    """Return the sum of a number that each process has of its rows; of processes with the same rows one counts."""
    shards = len(own_rows(mesh, mesh.shape["data"] * mesh.shape["fsdp"]))
    return round(float(gather(np.full(shards, count / shards), mesh).sum()))
