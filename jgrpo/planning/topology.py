# SPDX-License-Identifier: Apache-2.0
"""TPU slices by name, such as v5e:8x8, as devices that programs can be compiled for on a machine without any."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from jgrpo.planning.chips import CHIPS, Chip
from model_port.errors import UserError
from model_port.partition import MeshConfig

# Without a TPU at hand the library would look for one on the network, complain of what it does not find, and let only
# one process of a machine use it.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclass(frozen=True)
class Slice:
    """A TPU slice: `name` such as v5e:8x8, and how many chips that is."""

    name: str
    chip: Chip
    chips: int

    @classmethod
    def named(cls, name: str) -> "Slice":
        """Read a name.

        Raises:
            UserError: another generation, or not as many sizes as its slices have dimensions.
        """
        generation, _, shape = name.partition(":")
        chip = CHIPS.get(generation)
        sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
        if chip is None or len(sizes) != chip.dimensions or 0 in sizes:
            lines = "\n".join(f"  {known.name}:" + f", {known.name}:".join(known.shapes) for known in CHIPS.values())
            raise UserError(f"topology {name!r} is not known; use a generation and its shape, such as\n{lines}")
        return cls(name, chip, math.prod(sizes))

    def devices(self) -> list[Any]:
        """Return the slice's chips as devices to compile for.

        Raises:
            UserError: the TPU compiler is not installed, or it knows no such slice.
        """
        if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise UserError(
                "the TPU compiler (libtpu) is not installed; it needs no TPU: install it by the extra tpu, "
                "pip install 'jgrpo[tpu]', or as part of jax[tpu]"
            )
        for variable, value in QUIET.items():
            os.environ.setdefault(variable, value)
        options: dict[str, Any] = dict(self.chip.options)
        if self.chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options)
        except jax.errors.JaxRuntimeError as error:
            known = ", ".join(f"{self.chip.name}:{shape}" for shape in self.chip.shapes)
            raise UserError(
                f"the TPU compiler knows no slice {self.name} ({error}); common ones are {known}"
            ) from error
        return found.devices


def check_mesh(mesh: MeshConfig, place: Slice) -> None:
    """Raise a UserError unless the mesh has as many devices as the slice has chips."""
    if mesh.size != place.chips:
        raise UserError(
            f"the mesh data={mesh.data} x fsdp={mesh.fsdp} x tensor={mesh.tensor} is {mesh.size} chips and "
            f"{place.name} has {place.chips}; set for example --mesh.data 1 --mesh.fsdp {place.chips} --mesh.tensor 1, "
            "or let --search find one"
        )
