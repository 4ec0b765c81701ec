# SPDX-License-Identifier: Apache-2.0
"""What one chip does in a compiled program: matrix FLOPs, HBM traffic and collectives, loops times their trip counts.

XLA's own cost analysis counts the body of a loop once, so these are counted from the text of the program.
"""

import functools
import math
import re
from dataclasses import dataclass, field, replace

import numpy as np

from jgrpo.planning.hlo import Array, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Neither computes nor moves anything: names of values, control flow, and halves of operations counted by the other.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "copy-done", "partition-id", "replica-id", "iota", "async-start", "async-update", "async-done",
    "opt-barrier", "domain", "add-dependency", "get-dimension-size",
}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """Collectives of one place in the program.

    Attributes:
        kind: such as all-gather.
        count: times that it runs.
        sent: bytes that a chip sends for all of them, by the ring algorithm.
        group: chips that take part together.
        shape: of what a chip gives, such as bf16[128,8192].
        loops: loops around it, from the outside in: their trip counts, None for what the data decides.
        source: the traced operation.
    """

    kind: str
    count: float
    sent: float
    group: int
    shape: str
    loops: tuple[int | None, ...]
    source: str

    @property
    def hops(self) -> float:
        """Steps from chip to chip, one after the other, on a ring that is used in both directions."""
        steps = {"all-reduce": self.group, "collective-permute": 1}.get(self.kind, self.group / 2)
        return self.count * steps if self.group > 1 else 0.0


@dataclass
class Cost:
    """What a chip does in one call of a program.

    Attributes:
        flops: of matrix products and convolutions.
        hbm_bytes: read from and written to HBM.
        unknown_loops: loops whose number of trips the data decides and that were counted as one trip.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    unknown_loops: int = 0

    @property
    def sent(self) -> float:
        """Bytes that a chip sends."""
        return sum(collective.sent for collective in self.collectives)

    @property
    def hops(self) -> float:
        """Steps from chip to chip that its collectives take one after the other."""
        return sum(collective.hops for collective in self.collectives)


def program_cost(text: str, *, devices: int, trips: int | None = None) -> Cost:
    """Return what one chip does in a program given as compiled HLO.

    Args:
        devices: chips of the program, for collectives that name no groups.
        trips: of a loop whose end the data decides; without it, and inside of such a loop, one counts as one trip.
    """
    return _Counter(Module(text), devices, trips).total()


class _Counter:
    def __init__(self, module: Module, devices: int, trips: int | None):
        self.module, self.devices, self.data_trips = module, devices, trips
        self.cost = Cost()
        self.overlapped: dict[str, Collective] = {}  # by channel

    def total(self) -> Cost:
        """Return the cost of the entry computation."""
        self.computation(self.module.entry, 1.0, ())
        self.cost.collectives += self.overlapped.values()
        return self.cost

    def computation(self, name: str, times: float, loops: tuple[int | None, ...]) -> None:
        """Count a computation that runs so many times."""
        for found in self.module.computations[name].values():
            if found.operation == "while":
                self._loop(found, name, times, loops)
            elif found.operation == "conditional":
                self._branches(found, times, loops)
            elif found.operation in ("call", "async-start"):
                self.computation(found.attribute("to_apply") or found.attribute("calls"), times, loops)
            elif found.operation == "fusion":
                self._fusion(found, name, times, loops)
            else:
                self._work(found, name, times, loops)
                self.cost.hbm_bytes += times * self._traffic(found, name)

    def _loop(self, found: Instruction, where: str, times: float, loops: tuple[int | None, ...]) -> None:
        known = self.module.trips(found, where)
        count = known
        if known is None:
            given = self.data_trips is not None and None not in loops
            count = self.data_trips if given else 1
            self.cost.unknown_loops += not given
        for part in ("condition", "body"):
            self.computation(found.attribute(part), times * count, (*loops, known))

    def _branches(self, found: Instruction, times: float, loops: tuple[int | None, ...]) -> None:
        """Count the dearest branch; which one runs is not known."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", found.rest)
        names = [found.attribute(part) for part in ("true_computation", "false_computation")]
        if listed:
            names = [name.strip(" %") for name in listed[1].split(",")]
        costs = []
        for name in names:
            branch = _Counter(self.module, self.devices, self.data_trips)
            branch.computation(name, times, loops)
            branch.cost.collectives += branch.overlapped.values()
            costs.append(branch.cost)
        dearest = max(costs, key=lambda cost: (cost.flops, cost.hbm_bytes))
        self.cost.flops += dearest.flops
        self.cost.hbm_bytes += dearest.hbm_bytes
        self.cost.collectives += dearest.collectives
        self.cost.unknown_loops += dearest.unknown_loops

    def _fusion(self, found: Instruction, where: str, times: float, loops) -> None:
        """Count what a fusion computes, and what it reads and writes as a whole.

        A collective that overlaps with other work stands in several fusions, some of them in loops between its start
        and its end. It runs where the fewest loops are around it.
        """
        inside = found.attribute("calls")
        for part in self.module.computations[inside].values():
            channel = re.search(r"channel_id=(\d+)", part.rest)
            if part.operation == "fusion":
                self._fusion(part, inside, times, loops)
            elif _kind(part) and channel:
                one = self._collective(part, inside, times, loops, scatter="all-reduce-scatter" in inside)
                other = self.overlapped.get(channel[1])
                self.overlapped[channel[1]] = one if other is None or one.count < other.count else other
            else:
                self._work(part, inside, times, loops)
        if where not in self._fused_computations:
            self.cost.hbm_bytes += times * self._fusion_traffic(found, where, inside)

    @functools.cached_property
    def _fused_computations(self) -> set[str]:
        every = (found for part in self.module.computations.values() for found in part.values())
        return {found.attribute("calls") for found in every if found.operation == "fusion"}

    def _work(self, found: Instruction, where: str, times: float, loops) -> None:
        """Count the FLOPs of a product, or the bytes of a collective."""
        if found.operation in ("dot", "convolution"):
            left, right = (self._arrays(where, name)[0] for name in found.operands[:2])
            count = dot_flops if found.operation == "dot" else convolution_flops
            self.cost.flops += times * count(found, left, right)
        elif _kind(found):
            self.cost.collectives.append(self._collective(found, where, times, loops))

    def _collective(self, found: Instruction, where: str, times: float, loops, *, scatter: bool = False) -> Collective:
        kind, group = _kind(found), group_size(found.rest, self.devices)
        kind = "reduce-scatter" if scatter and kind == "all-reduce" else kind
        arrays = [array for name in found.operands for array in self._arrays(where, name)]
        share = (group - 1) / group
        factor = {"all-gather": group - 1, "all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
        sent = times * factor * sum(array.bytes for array in arrays)
        shape = ", ".join(f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in arrays[:3])
        more = f" and {len(arrays) - 3} more" if len(arrays) > 3 else ""
        return Collective(kind, times, sent, group, shape + more, loops, found.source)

    def _traffic(self, found: Instruction, where: str) -> float:
        """Return the bytes that an operation outside of fusions reads from and writes to HBM."""
        if found.operation in FREE or found.operation.endswith("-done") or _is_handle(found):
            return 0.0
        if found.operation.endswith("-start") and not _kind(found):
            # A copy or a slice on its way between memories; beside its result stands what it was taken from.
            moved = min(found.result[:2], key=lambda array: array.bytes)
            return sum(replace(moved, space=array.space).hbm_bytes for array in found.result[:2])
        return self._written(found, where) + sum(
            self._read(found, where, place) for place in range(len(found.operands))
        )

    def _fusion_traffic(self, found: Instruction, where: str, inside: str) -> float:
        total = 0.0
        parts = self.module.computations[inside]
        for part in parts.values():
            if part.operation == "parameter":
                whole = sum(array.hbm_bytes for array in self._arrays(where, found.operands[part.number]))
                total += min(whole, self._used(part.name, inside)) if whole else 0.0
        root = self.module.root(inside)
        outputs = [parts[name] for name in root.operands] if root.operation == "tuple" else [root]
        if len(outputs) != len(found.result):  # several outputs of one operation
            return total + (0.0 if _is_handle(root) else sum(array.hbm_bytes for array in found.result))
        for output, array in zip(outputs, found.result, strict=True):
            if not array.space and not self._passes_through(output, inside):
                total += min(array.hbm_bytes, self._written(output, inside) or array.hbm_bytes)
        return total

    def _passes_through(self, output: Instruction, inside: str) -> bool:
        """Whether a fusion hands out a buffer that it was given, or that a collective fills."""
        while output.operation in ("get-tuple-element", "bitcast"):
            output = self.module.computations[inside][output.operands[0]]
        return output.operation == "parameter" or _is_handle(output)

    def _used(self, name: str, inside: str) -> float:
        """Return how much of a fusion's parameter is read: nothing, slices of it, or (infinite) all of it."""
        total = 0.0
        for part in self.module.computations[inside].values():
            for place in (place for place, operand in enumerate(part.operands) if operand == name):
                if part.operation in ("bitcast", "copy", "reshape", "transpose", "get-tuple-element"):
                    total += self._used(part.name, inside)
                elif part.operation == "fusion":
                    total += self._used(self.module.parameter(part.attribute("calls"), place), part.attribute("calls"))
                elif part.operation in SLICES and place == 0:
                    total += self._read(part, inside, place)
                elif not _is_handle(part) and not _kind(part) and not (part.operation == "tuple" and part.is_root):
                    total += math.inf
        return total

    def _read(self, found: Instruction, where: str, place: int) -> float:
        """Return the bytes that an operation reads of one of its operands."""
        arrays = self._arrays(where, found.operands[place])
        whole = sum(array.hbm_bytes for array in arrays)
        if found.operation in SLICES and place == 0:
            if found.operation == "dynamic-update-slice":
                return 0.0
            part = sum(replace(array, space=0).hbm_bytes for array in found.result)
            return min(whole, part)
        return whole

    def _written(self, found: Instruction, where: str) -> float:
        """Return the bytes that an operation writes: of an update in place, the update alone."""
        if found.operation == "dynamic-update-slice":
            update = self._arrays(where, found.operands[1])
            return sum(replace(array, space=found.result[0].space).hbm_bytes for array in update)
        if found.operation in ("bitcast", "copy", "reshape") and found.operands:
            inner = self.module.computations[where].get(found.operands[0])
            if inner is not None and inner.operation == "dynamic-update-slice":
                return self._written(inner, where)
        return sum(array.hbm_bytes for array in found.result)

    def _arrays(self, where: str, name: str) -> tuple[Array, ...]:
        return self.module.computations[where][name].result


HANDLES = re.compile(r'target="(AsyncCollective|AllocateBuffer)')
SLICES = ("dynamic-slice", "slice", "gather", "dynamic-update-slice")


def _is_handle(found: Instruction) -> bool:
    """Whether an operation only names buffers: of a collective under way, or of memory to be filled."""
    return found.operation == "custom-call" and bool(HANDLES.search(found.rest))


def _kind(found: Instruction) -> str | None:
    """Return the kind of a collective, counted where it starts."""
    operation = found.operation.removesuffix("-start")
    return operation if operation in KINDS else None


def group_size(text: str, devices: int) -> int:
    """Return how many chips take part in a collective together, from its attributes."""
    if "source_target_pairs" in text:
        return devices
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", text)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(listed[1].split(",")) if listed else devices


def dot_flops(found: Instruction, left: Array, right: Array) -> float:
    """Return the FLOPs of a matrix product: two for each multiplication."""
    contracted = math.prod(left.dims[axis] for axis in found.numbers("lhs_contracting_dims"))
    return 2.0 * found.result[0].size * contracted


def convolution_flops(found: Instruction, left: Array, right: Array) -> float:
    """Return the FLOPs of a convolution, which is what the TPU compiler makes of matrix products.

    Only where the window lies on the input is anything multiplied: a batched product is written as a convolution with
    a window that meets the input in few places.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", found.rest)
    inputs, kernel, output = labels[1], labels[2], labels[3]
    out = found.result[0]
    total = 2.0 * out.dims[output.index("b")] * out.dims[output.index("f")] * right.dims[kernel.index("i")]
    window = _window(found.rest)
    spatial = sorted(label for label in kernel if label.isdigit())
    for place, label in enumerate(spatial):
        settings = {name: values[place] for name, values in window.items() if place < len(values)}
        sizes = (left.dims[inputs.index(label)], right.dims[kernel.index(label)], out.dims[output.index(label)])
        total *= _overlaps(*sizes, **settings)
    return total


def _window(text: str) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", text)
    settings = dict(part.split("=", 1) for part in found[1].split()) if found else {}
    numbers = {
        name: [int(value) for value in settings[key].split("x")]
        for name, key in (("stride", "stride"), ("dilate", "lhs_dilate"), ("kernel_dilate", "rhs_dilate"))
        if key in settings
    }
    if "pad" in settings:
        numbers["pad"] = [int(value.split("_")[0]) for value in settings["pad"].split("x")]
    return numbers


@functools.lru_cache(maxsize=1024)
def _overlaps(
    size: int, kernel: int, output: int, *, stride: int = 1, pad: int = 0, dilate: int = 1, kernel_dilate: int = 1
) -> int:
    """Return how many (output position, kernel position) pairs of one dimension meet an input element."""
    places = np.arange(output)[:, None] * stride - pad + np.arange(kernel)[None, :] * kernel_dilate
    inside = (places >= 0) & (places <= (size - 1) * dilate) & (places % dilate == 0)
    return int(inside.sum())
