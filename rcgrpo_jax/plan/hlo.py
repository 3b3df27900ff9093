"""Reads the text of a compiled program (XLA's HLO): computations, instructions, shapes, attributes.

It buys what XLA's own `cost_analysis()` leaves out: loop bodies times their trip counts, so that a plan counts every
layer and every solver step, and the bytes of each collective, so that it knows which of them leave the slice.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_SHAPE = re.compile(r"\b(pred|token|opaque|[subf]\d\w*|bf16|c64|c128)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


class Shape(NamedTuple):
    """An array of a program."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False  # in a memory nearer than HBM: TPU's VMEM and SMEM, written S(1) and up

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0]) if _BITS.get(self.dtype) != 0 else 0
        return math.prod(self.dims) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]  # of the result; several if it is a tuple
    opcode: str
    operands: tuple[str, ...]  # names
    literal: str  # what stands between the parentheses
    attributes: str  # what follows them

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return re.findall(r"%?([\w.\-]+)", found[1])
        return [name for side in ("true", "false") if (name := self.called(f"{side}_computation"))]

    @property
    def channel(self) -> str | None:
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """A function of the program; instructions in order, by name."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                if name in found:
                    found[name].append(instruction)
        return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of its entry."""
    computations, entry, current = {}, "", None
    for line in _joined(text):
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (start := _INSTRUCTION.match(line)):
            instruction = _instruction(start[2], line[start.end() :])
            current.instructions[instruction.name] = instruction
            if start[1]:
                current.root = instruction
    return computations, entry


def _joined(text: str) -> list[str]:
    """Lines, each instruction on one: a kernel's own attributes may go over several, and begin with a brace."""
    lines: list[str] = []
    for line in text.splitlines():
        starts = not line or line == "}" or _INSTRUCTION.match(line) or _COMPUTATION.match(line)
        if starts or not (lines and _INSTRUCTION.match(lines[-1])):
            lines.append(line)
        else:
            lines[-1] += line
    return lines


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opened = rest.index("(", end)
    closed = _closing(rest, opened)
    literal = rest[opened + 1 : closed]
    return Instruction(
        name,
        tuple(shapes(rest[:end])),
        rest[end:opened].strip(),
        tuple(re.findall(r"%([\w.\-]+)", literal)),
        literal,
        rest[closed + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[start : start + 80]!r}")


def shapes(text: str) -> list[Shape]:
    """The arrays of a type, tuples laid flat."""
    return [
        Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), bool(re.search(r"S\([1-9]", layout)))
        for dtype, dims, layout in _SHAPE.findall(text)
    ]


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """The devices of each group of a collective, `[groups, size]`; one group of all if none are named.

    Written `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, or by mesh axes, `mesh['a'=2,'b'=4] {'b'}`; where the devices of
    the mesh are not in order, `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`.
    """
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return np.asarray([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", found[1])])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, dims, order = map(_numbers, found.groups())
        return _ordered(dims, order).reshape(groups)
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    ):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        grouped = re.findall(r"'([^']+)'", found[4])
        dims, order = _numbers(found[2]) or list(sizes.values()), _numbers(found[3])
        devices = _ordered(dims, order).reshape(list(sizes.values()))
        last = [list(sizes).index(axis) for axis in grouped]
        devices = np.moveaxis(devices, last, range(-len(last), 0))
        return devices.reshape(-1, math.prod(sizes[axis] for axis in grouped))
    return np.arange(num_devices)[None]


def _numbers(text: str | None) -> list[int]:
    return [int(i) for i in (text or "").split(",") if i]


def _ordered(dims: list[int], order: list[int]) -> np.ndarray:
    """Devices 0, 1, ... as an array of `dims`, its axes in another order if one is given."""
    devices = np.arange(math.prod(dims)).reshape(dims)
    return devices.transpose(order) if order else devices
