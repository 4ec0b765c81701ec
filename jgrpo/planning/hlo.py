# SPDX-License-Identifier: Apache-2.0
"""Compiled HLO as text: computations, instructions, shapes, and how often a loop runs.

Only what the plan needs of the grammar is read: one instruction per line, its result, operation, operands and the
attributes by name.
"""

import functools
import math
import re
from dataclasses import dataclass

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
# Their value or number stands where other operations have operands.
LITERALS = ("constant", "parameter")

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
        order: dimensions from the fastest to the slowest; empty where the text gives no layout.
        tile: sizes of the first tile, such as (8, 128); empty where there is none.
        space: memory space; 0 is HBM (or the host's memory), others are on the chip itself.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes of the elements alone."""
        return self.size * _bits(self.dtype) / 8

    @property
    def hbm_bytes(self) -> float:
        """Bytes that reading all of it takes from HBM, the padding to whole tiles included; 0 if it is not there."""
        if self.space:
            return 0.0
        dims = dict(enumerate(self.dims))
        for axis, tile in zip(self.order, reversed(self.tile), strict=False):
            dims[axis] = -(-dims[axis] // tile) * tile
        return math.prod(dims.values()) * _bits(self.dtype) / 8


@dataclass(frozen=True)
class Instruction:
    """One line: `name = result operation(operands), attributes`."""

    name: str
    operation: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """Return the computation that an attribute such as `body` or `calls` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return the numbers of an attribute such as lhs_contracting_dims={2}."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.rest)
        return tuple(int(part) for part in found[1].split(",") if part) if found else ()

    @property
    def number(self) -> int | None:
        """The number of a parameter or the value of an integer constant; None for anything else."""
        found = re.match(r"(-?\d+)\)", self.rest) if self.operation in LITERALS else None
        return int(found[1]) if found else None

    @property
    def source(self) -> str:
        """The traced operation that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Module:
    """The computations of a program by name; each is its instructions by name, in their order."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if line[:1] not in (" ", "}", ""):
                header = _HEADER.match(line)
                current = self.computations.setdefault(header[2], {}) if header else None
                if header and header[1]:
                    self.entry = header[2]
            elif current is not None and " = " in line:
                instruction = parse_instruction(line)
                current[instruction.name] = instruction

    def root(self, computation: str) -> Instruction:
        """Return the instruction whose value a computation returns."""
        return next(found for found in self.computations[computation].values() if found.is_root)

    def parameter(self, computation: str, number: int) -> str:
        """Return the name of a computation's parameter."""
        parts = self.computations[computation].values()
        return next(part.name for part in parts if part.operation == "parameter" and part.number == number)

    def trips(self, loop: Instruction, where: str) -> int | None:
        """Return how often a while loop runs, or None where the program decides that by its data.

        Args:
            where: the computation that holds the loop.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        bound = self._bound(loop.attribute("condition"))
        if bound is None:
            return None
        index, limit = bound
        start = self._constant(where, self._element(where, loop.operands[0], index))
        step = self._step(loop.attribute("body"), index)
        return None if start is None or not step else max(0, -(-(limit - start) // step))

    def _bound(self, condition: str) -> tuple[int, int] | None:
        """Return (i, N) of a condition `state[i] < N`."""
        root, where = self.root(condition), condition
        names = root.operands
        if root.operation in ("fusion", "call"):
            where = root.attribute("calls") or root.attribute("to_apply")
            inner = self.root(where)
            names = tuple(self._argument(root, where, name) for name in inner.operands)
            root = inner
        if root.operation != "compare" or "direction=LT" not in root.rest:
            return None
        index = self._index(condition, names[0])
        limit = self._constant(condition, names[1]) if names[1] else None
        if limit is None:
            limit = self._constant(where, root.operands[1])
        return None if index is None or limit is None else (index, limit)

    def _argument(self, call: Instruction, inside: str, name: str) -> str:
        """Return what the caller gives for a parameter of a called computation; "" for anything else."""
        found = self.computations[inside].get(name)
        return call.operands[found.number] if found and found.operation == "parameter" else ""

    def _index(self, where: str, name: str) -> int | None:
        """Return i where an instruction is state[i] of the computation's parameter."""
        found = self._behind_copies(where, name)
        number = re.search(r"\bindex=(\d+)", found.rest) if found else None
        return int(number[1]) if number and found.operation == "get-tuple-element" else None

    def _element(self, where: str, name: str, index: int) -> str:
        found = self._behind_copies(where, name)
        return found.operands[index] if found and found.operation == "tuple" else ""

    def _constant(self, where: str, name: str) -> int | None:
        found = self._behind_copies(where, name)
        return found.number if found and found.operation == "constant" else None

    def _step(self, body: str, index: int) -> int | None:
        """Return what a loop's body adds to state[index]."""
        added = self._behind_copies(body, self._element(body, self.root(body).name, index))
        where = body
        if added and added.operation == "fusion":
            where = added.attribute("calls")
            added = self.root(where)
        if not added or added.operation != "add":
            return None
        steps = [self._constant(where, name) for name in added.operands]
        return next((step for step in steps if step is not None), None)

    def _behind_copies(self, where: str, name: str) -> Instruction | None:
        found = self.computations[where].get(name)
        while found and found.operation in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            found = self.computations[where].get(found.operands[0])
        return found


def parse_instruction(line: str) -> Instruction:
    """Read one line of a computation."""
    left, right = line.strip().split(" = ", 1)
    is_root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    call = right[end:].lstrip()
    opening = call.index("(")
    closing = _closing(call, opening)
    operation, inner = call[:opening], call[opening + 1 : closing]
    literal = operation in LITERALS
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        operation=operation,
        result=tuple(map(_array, _SHAPE.findall(right[:end]))),
        operands=() if literal else tuple(_NAME.findall(inner)),
        rest=call[opening + 1 if literal else closing + 1 :],
        is_root=is_root,
    )


def _closing(text: str, opening: int) -> int:
    """Return where the parenthesis that opens at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


@functools.lru_cache(maxsize=8192)
def _array(parts: tuple[str, str, str]) -> Array:
    dtype, dims, layout = parts
    order, _, tiling = layout.partition(":")
    tile, space = re.match(r"T\(([\d,]+)\)", tiling), re.search(r"S\((\d+)\)", tiling)
    return Array(
        dtype,
        tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
        tuple(int(axis) for axis in order.split(",") if axis),
        tuple(int(size) for size in tile[1].split(",")) if tile else (),
        int(space[1]) if space else 0,
    )


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8
