# SPDX-License-Identifier: Apache-2.0
"""One program through the compiler: its memory, what a chip does in it, and how long that takes at least."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from jgrpo.planning.arrays import chip_bytes
from jgrpo.planning.chips import HOP_SECONDS, Chip
from jgrpo.planning.cost import Cost, program_cost
from jgrpo.planning.programs import AbstractRun, Call

# Two ways in which the compiler says how much a program needs, its arguments included.
TOO_MUCH = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)\b.*(?:of|exceeds)")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip while a program runs.

    Attributes:
        arguments: of the program.
        outputs: beyond those that take the place of arguments.
        temporaries: of the program, its code among them.
        beside: arrays of the run that this program does not read.
    """

    arguments: float
    outputs: float
    temporaries: float
    beside: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.arguments + self.outputs + self.temporaries + self.beside


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program.

    Attributes:
        seconds: that tracing and compiling took.
        memory: where the program did not fit into the HBM, all that it needs counts as temporaries.
        text: the compiled program; "" if it did not fit.
    """

    seconds: float
    memory: Memory
    text: str


@dataclass(frozen=True)
class Measured:
    """A program of the plan.

    Attributes:
        cost: None if the program did not fit, so that there is none.
        expected_flops: of a chip, by the number of parameters and tokens.
    """

    name: str
    times: int
    memory: Memory
    cost: Cost | None
    expected_flops: float
    compile_seconds: float

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Return the least seconds of one call by what bounds it; empty where the program did not fit."""
        if self.cost is None:
            return {}
        return {
            "compute": self.cost.flops / chip.flops,
            "memory": self.cost.hbm_bytes / chip.hbm_bandwidth,
            "network": self.cost.sent / chip.ici_bandwidth + self.cost.hops * HOP_SECONDS,
        }

    def fits(self, chip: Chip) -> bool:
        """Whether it runs on the chip with all that the run keeps there."""
        return self.cost is not None and self.memory.total <= chip.hbm


def compile_call(call: Call, mesh: Mesh, platforms: tuple[str, ...] | None = None) -> Compiled:
    """Compile a program for the devices of a mesh; `platforms` names theirs where JAX cannot tell."""
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = call.program.trace(*call.arguments, **call.options).lower(lowering_platforms=platforms)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = TOO_MUCH.search(str(error))
        if used is None:
            raise
        return Compiled(time.perf_counter() - start, Memory(0.0, 0.0, float(used[1]) * UNITS[used[2]]), "")
    sizes = compiled.memory_analysis()
    memory = Memory(
        arguments=float(sizes.argument_size_in_bytes),
        outputs=float(sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
        temporaries=float(sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes),
    )
    return Compiled(time.perf_counter() - start, memory, compiled.as_text())


def measure(run: AbstractRun, call: Call, compiler: Callable[[Call, Mesh], Compiled] = compile_call) -> Measured:
    """Compile a call of the run and count what it does."""
    found = compiler(call, run.mesh)
    chips = run.mesh.size
    own = chip_bytes([call.arguments, run.state, run.ref_params, run.frozen])
    read = found.memory.arguments if found.text else chip_bytes(call.arguments)
    beside = max(0.0, own - read)
    temporaries = found.memory.temporaries * call.at_a_time
    memory = Memory(found.memory.arguments, found.memory.outputs, temporaries, beside)
    cost = program_cost(found.text, devices=chips, trips=call.trips) if found.text else None
    return Measured(call.name, call.times, memory, cost, call.flops / chips, found.seconds)
