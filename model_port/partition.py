# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: logical axes of parameters to axes of the mesh (data, fsdp, tensor). It raises, never falls back.

Every parameter names its axes (`layers`, `embed`, `heads`, ...) when it is created. A table says which mesh axis each
one is split over; what it does not name is replicated. `TRAINING` is the table of everything but decoding.

For decoding, which reads all weights for every token, they are laid out once per rollout in one of two ways. Gathered:
whole over fsdp, so that a token moves no weights. Stationary: as in training, where the gathered ones do not fit; then
it is the activations of a token that travel, which are small, and each device multiplies by the part that it has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from model_port.errors import UserError

BATCH_AXES = ("data", "fsdp")  # the prompt axis of every batch array is split over both

TRAINING = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "enc_embed": "fsdp",
    "enc_heads": "tensor",
    "enc_mlp": "tensor",
    "proj_embed": "fsdp",
    "proj_heads": "tensor",
    "proj_mlp": "tensor",
}

# Rows of embedding and head, on every mesh and on none, so that samples do not depend on it; see vocab_multiple.
VOCAB_MULTIPLE = 8

GATHERED = {axis: mesh_axis for axis, mesh_axis in TRAINING.items() if mesh_axis != "fsdp"}
ROLLOUT = {"gathered": GATHERED, "stationary": TRAINING}


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes: data (copies), fsdp (parameters split, batch split), tensor (heads and widths split)."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Devices in the mesh."""
        return self.data * self.fsdp * self.tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh (data, fsdp, tensor) over the first `config.size` devices, of all that there are by default.

    An axis of the mesh may be a part of one of a TPU slice: without leave to split, 16 x 4 has no place on 8x8.

    Raises:
        UserError: an axis below 1, more devices than there are, or, with several processes, fewer.
    """
    sizes = (config.data, config.fsdp, config.tensor)
    if min(sizes) < 1:
        raise UserError(f"mesh {sizes} (data, fsdp, tensor): every axis must be at least 1")
    devices = jax.devices() if devices is None else list(devices)
    if config.size > len(devices):
        raise UserError(
            f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} needs {config.size} devices; "
            f"this process sees {len(devices)} ({devices[0].platform}); make the mesh smaller or add devices"
        )
    if jax.process_count() > 1 and config.size < len(devices):
        raise UserError(
            f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} has {config.size} devices and the "
            f"{jax.process_count()} processes of this run have {len(devices)}; use all of them"
        )
    placed = mesh_utils.create_device_mesh(sizes, devices[: config.size], allow_split_physical_axes=True)
    return Mesh(placed, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def vocab_multiple(mesh: Mesh | AbstractMesh) -> int:
    """Return the multiple that a vocabulary is padded to: of 8, and of the tensor axis."""
    return math.lcm(VOCAB_MULTIPLE, mesh.shape["tensor"])


def param_shardings(
    state: nnx.State, mesh: Mesh | AbstractMesh, table: dict[str, str] = TRAINING
) -> dict[str, NamedSharding]:
    """Return {dotted path: sharding} for every variable of an (abstract) model state.

    What fsdp does not divide is whole on each of its devices: that axis only says where memory is saved.

    Raises:
        UserError: a dimension that the tensor axis does not divide, or two dimensions on one mesh axis.
    """
    shardings = {}
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        spec = [table.get(axis) for axis in variable.get_metadata("axes")]
        spec = [
            None if axis == "fsdp" and size % mesh.shape[axis] else axis
            for size, axis in zip(variable.shape, spec, strict=True)
        ]
        _check_spec(name, variable.shape, spec, mesh)
        shardings[name] = NamedSharding(mesh, PartitionSpec(*spec))
    return shardings


def undivided(state: nnx.State, mesh: Mesh) -> list[str]:
    """Return the parameters that could be split over fsdp and are whole, as it does not divide them."""
    shardings = param_shardings(state, mesh)
    found = []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        wanted = [TRAINING.get(axis) for axis in variable.get_metadata("axes")]
        if mesh.shape["fsdp"] > 1 and "fsdp" in wanted and "fsdp" not in shardings[name].spec:
            found.append(name)
    return found


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is prompts."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain(x: jax.Array, axis: int = 0) -> jax.Array:
    """Keep the prompt axis of an activation split over data and fsdp, where a mesh is set; else return it as it is."""
    return _constrain(x, PartitionSpec(*(None,) * axis, BATCH_AXES))


def constrain_stream(x: jax.Array, stationary: bool) -> jax.Array:
    """Lay out the residual stream [P, ..., D]: split by prompts, or with stationary weights by features over fsdp."""
    if not stationary:
        return constrain(x)
    return _constrain(x, PartitionSpec("data", *(None,) * (x.ndim - 2), "fsdp"))


def constrain_features(x: jax.Array, stationary: bool) -> jax.Array:
    """With stationary weights, split [P, ..., features] over tensor: all prompts of a data shard on every device."""
    if not stationary:
        return x
    return _constrain(x, PartitionSpec("data", *(None,) * (x.ndim - 2), "tensor"))


def constrain_heads(x: jax.Array, axis: int = 0) -> jax.Array:
    """Split queries, keys or values [..., heads, width] by prompts, which are at `axis`, and heads over tensor."""
    mesh = jax.sharding.get_abstract_mesh()
    heads = "tensor" if not mesh.empty and x.shape[-2] % mesh.shape["tensor"] == 0 else None
    between = (None,) * (x.ndim - axis - 3)
    return _constrain(x, PartitionSpec(*(None,) * axis, BATCH_AXES, *between, heads, None))


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)


def check_divides(what: str, count: int, mesh: MeshConfig) -> None:
    """Raise unless `count` rows can be split over the data and fsdp axes."""
    shards = mesh.data * mesh.fsdp
    if count % shards:
        raise UserError(
            f"{what} is {count}, which does not divide over data x fsdp = {mesh.data} x {mesh.fsdp} = {shards}; "
            f"use a multiple of {shards} or a smaller mesh"
        )


def _check_spec(name: str, shape: tuple[int, ...], spec: list[str | None], mesh: Mesh | AbstractMesh) -> None:
    used = [axis for axis in spec if axis]
    if len(used) != len(set(used)):
        raise UserError(f"parameter {name} {shape}: two of its dimensions map to one mesh axis: {spec}")
    for dimension, (size, axis) in enumerate(zip(shape, spec, strict=True)):
        parts = math.prod(mesh.shape[a] for a in ((axis,) if axis else ()))
        if size % parts:
            raise UserError(
                f"parameter {name} {shape}: dimension {dimension} of size {size} does not divide over mesh axis "
                f"{axis!r} of size {parts}; choose a {axis} size that divides {size}"
            )
