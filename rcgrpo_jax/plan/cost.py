"""What a compiled program does on one device: FLOPs, HBM traffic and collectives, loop bodies times their trip counts.

XLA's own `cost_analysis()` counts the body of a loop once. Here matrix products and convolutions count as XLA counts
them (2 FLOPs a multiply-add that meets data, not padding); element-wise work does not count. A kernel counts what it
states, and JAX's attention kernel for TPU and cuDNN's, which state nothing, by their operands. Of a conditional the
dearer branch counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Self

import numpy as np

from rcgrpo_jax.plan.hlo import Computation, Instruction, Shape, parse, replica_groups
from rcgrpo_jax.plan.traffic import hbm_bytes

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Bytes that a device sends of an operand of one byte, in a group of n (ring algorithms).
_SENT = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
# Between slices the TPU compiler hands the data to the host, and its runtime does the collective.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_COMPUTES = re.compile(r"__cu|__triton|__onednn|tpu_custom_call")  # custom calls that may hold matrix products
_SPLASH = re.compile(r"splash_mha_(fwd|dq|dkv)\w*/pallas_call")
# Matrix products of a splash kernel: q k^T, p v | q k^T, do v^T, ds k | q k^T, p^T do, do v^T, ds^T q. The last one
# has two scratch arrays and dk, dv as results; where there are more, it computes dq = ds k too.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}


@dataclass
class Traffic:
    """Collectives of one kind."""

    count: float = 0.0
    ici: float = 0.0  # bytes that a device sends inside its slice
    dcn: float = 0.0  # bytes that a device sends in collectives that cross slices


@dataclass
class Cost:
    """The work of one device."""

    flops: float = 0.0
    bytes: float = 0.0  # to and from HBM
    collectives: dict[str, Traffic] = field(default_factory=dict)
    uncounted: dict[str, float] = field(default_factory=dict)  # custom calls of unknown FLOPs -> how often

    def add(self, other: Self, times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, traffic in other.collectives.items():
            own = self.collectives.setdefault(kind, Traffic())
            own.count += times * traffic.count
            own.ici += times * traffic.ici
            own.dcn += times * traffic.dcn
        for name, count in other.uncounted.items():
            self.uncounted[name] = self.uncounted.get(name, 0.0) + times * count

    @property
    def ici(self) -> float:
        return sum(traffic.ici for traffic in self.collectives.values())

    @property
    def dcn(self) -> float:
        return sum(traffic.dcn for traffic in self.collectives.values())


def count(text: str, slices: np.ndarray) -> Cost:
    """The cost of a compiled program on one device.

    Args:
        text: `jax.stages.Compiled.as_text()`.
        slices: The slice of each device of the mesh, `[devices]`.
    """
    computations, entry = parse(text)
    starting = {name for name, c in computations.items() if _starts(c)}
    channels = {i.channel for name in starting for i in computations[name].instructions.values()} - {None}

    @cache
    def of_computation(name: str) -> Cost:
        total = Cost()
        visit(computations[name], total, fused=False)
        return total

    def visit(computation: Computation, total: Cost, fused: bool) -> None:
        for instruction in computation.instructions.values():
            if not fused:
                total.bytes += hbm_bytes(instruction, computation, computations)
            opcode = instruction.opcode
            if opcode == "while":
                trips = trip_count(instruction, computation, computations)
                total.add(of_computation(instruction.called("body")), trips)
                total.add(of_computation(instruction.called("condition")), trips)
            elif opcode == "conditional":
                branches = [of_computation(name) for name in instruction.branches]
                total.add(max(branches, key=lambda cost: (cost.flops, cost.bytes)))
            elif opcode == "fusion":
                visit(computations[instruction.called("calls")], total, fused=True)
            elif opcode in ("call", "async-start"):
                total.add(of_computation(instruction.called("to_apply") or instruction.called("calls")))
            elif (kind := opcode.removesuffix("-start")) in COLLECTIVES:
                # The TPU compiler writes a gather into each of the fusions that it runs beside; the first one counts.
                if computation.name in starting or instruction.channel not in channels:
                    total.add(Cost(collectives={kind: sent(kind, instruction, computation, slices)}))
            elif opcode == "send" and (found := _BETWEEN_SLICES.search(instruction.attributes)):
                kind = {"ONE_TO_ONE": "collective-permute"}.get(found[1], found[1].lower().replace("_", "-"))
                size = sum(shape.bytes for shape in computation.operands(instruction)[0].shapes)
                traffic = Traffic(1.0, dcn=_SENT[kind](len(set(slices.tolist()))) * size)
                total.add(Cost(collectives={kind: traffic}))
            else:
                _compute(instruction, computation, total)

    return of_computation(entry)


def _starts(computation: Computation) -> bool:
    return any("AsyncCollectiveStart" in i.attributes for i in computation.instructions.values())


def _compute(instruction: Instruction, computation: Computation, total: Cost) -> None:
    if instruction.opcode == "dot":
        total.flops += dot_flops(instruction, computation)
    elif instruction.opcode == "convolution" or "__cudnn$conv" in instruction.attributes:
        total.flops += convolution_flops(instruction, computation)
    elif instruction.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
        if target.startswith("__cublas$"):
            total.flops += dot_flops(instruction, computation)
        elif estimate := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes):
            total.flops += int(estimate[1])
        elif target.startswith("__cudnn$fmha"):
            total.flops += cudnn_attention_flops(instruction, computation, backward="Backward" in target)
        elif kernel := _SPLASH.search(instruction.attributes):
            fused = kernel[1] == "dkv" and len(instruction.shapes) > 4
            products = _SPLASH_PRODUCTS["fused" if fused else kernel[1]]
            total.flops += products * splash_product_flops(instruction, computation)
        elif _COMPUTES.search(target):
            total.uncounted[target] = total.uncounted.get(target, 0.0) + 1


def dot_flops(instruction: Instruction, computation: Computation) -> float:
    """2 x elements of the result x length of the contraction."""
    left = computation.operands(instruction)[0].shapes[0]
    found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.attributes)
    contracted = [int(i) for i in re.findall(r"\d+", found[1])]
    return 2 * math.prod(instruction.shapes[0].dims) * math.prod(left.dims[i] for i in contracted)


def splash_product_flops(instruction: Instruction, computation: Computation) -> float:
    """2 x samples x heads x queries x keys x D, one of the matrix products of a splash attention kernel without a mask.

    After integer tables of tiles come queries `[..., N, D]` and keys `[..., M, D]`, padded to whole tiles; the kernel
    leaves none out.
    """
    arrays = [operand.shapes[0] for operand in computation.operands(instruction)]
    q, k = [array for array in arrays if array.dtype in ("bf16", "f32")][:2]
    return 2 * math.prod(q.dims) * k.dims[-2]


def cudnn_attention_flops(instruction: Instruction, computation: Computation, backward: bool) -> float:
    """2 x samples x queries x heads x D x keys, of cuDNN's two products forward (q k^T, p v) and five backward.

    Queries `[b, N, H, D]` and keys `[b, M, H, D]` come first. Backward are q k^T, p^T do, do v^T, ds k and ds^T q.
    """
    q, k = (operand.shapes[0].dims for operand in computation.operands(instruction)[:2])
    return (5 if backward else 2) * 2 * math.prod(q) * k[1]


def convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """2 x batch x features out x features in x pairs of (output cell, kernel cell) that meet data.

    The TPU compiler writes every matrix product as a convolution; a batched one has its batch in a window whose strides
    and dilations leave one kernel cell for each output cell, so that padding and holes must not count.
    """
    left, kernel = (operand.shapes[0] for operand in computation.operands(instruction)[:2])
    result = instruction.shapes[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = _window(instruction.attributes, sum(label.isdigit() for label in labels[1]))
    pairs = 1
    for axis, options in enumerate(window):
        size_in, size_out = (
            shape.dims[label.index(str(axis))] for shape, label in ((left, labels[0]), (result, labels[2]))
        )
        pairs *= _meeting(size_in, size_out, **options)
    features = math.prod(result.dims[labels[2].index(label)] for label in "bf")
    return 2 * features * kernel.dims[labels[1].index("i")] * pairs


def _window(attributes: str, num_axes: int) -> list[dict[str, int]]:
    """The window of each spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(item.split("=") for item in found[1].split()) if found else {}
    options = [{} for _ in range(num_axes)]
    for name in ("size", "stride", "lhs_dilate", "rhs_dilate"):
        for axis, value in enumerate(fields[name].split("x") if name in fields else ()):
            options[axis][name] = int(value)
    for axis, pad in enumerate(fields["pad"].split("x") if "pad" in fields else ()):
        options[axis]["pad"] = int(pad.split("_")[0])
    return options


def _meeting(
    size_in: int, size_out: int, size: int = 1, stride: int = 1, lhs_dilate: int = 1, rhs_dilate: int = 1, pad: int = 0
) -> int:
    """Pairs of an output and a kernel cell, along one axis, that fall on a cell of the input."""
    at = np.arange(size_out)[:, None] * stride + np.arange(size)[None] * rhs_dilate - pad
    return int(((at >= 0) & (at <= (size_in - 1) * lhs_dilate) & (at % lhs_dilate == 0)).sum())


def trip_count(loop: Instruction, computation: Computation, computations: dict[str, Computation]) -> int:
    """How often a loop runs: as XLA states it, else from its counter's start, step and bound.

    Raises:
        ValueError: If the loop does not count up to a constant.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (computations[loop.called(name)] for name in ("condition", "body"))
    test = condition.root
    if test is None or test.opcode != "compare":
        raise ValueError(f"the loop {loop.name} does not end by comparing a counter")
    counter, bound = condition.operands(test)
    direction, limit = test.called("direction"), _constant(bound)
    if counter.opcode != "get-tuple-element" or limit is None or direction not in ("LT", "LE"):
        raise ValueError(f"the loop {loop.name} does not count up to a constant")
    index = int(counter.called("index"))
    state = computation.operands(loop)[0]
    start = _constant(computation.operands(state)[index]) if state.opcode == "tuple" else None
    step = None
    if body.root is not None and body.root.opcode == "tuple":
        after = body.operands(body.root)[index]
        if after.opcode == "add":
            step = next((c for c in map(_constant, body.operands(after)) if c is not None), None)
    return math.ceil((limit + (direction == "LE") - (start or 0)) / (step or 1))


def _constant(instruction: Instruction) -> int | None:
    return int(instruction.literal) if instruction.opcode == "constant" else None


def sent(kind: str, instruction: Instruction, computation: Computation, slices: np.ndarray) -> Traffic:
    """What a device sends in one collective."""
    operands: list[Shape] = [shape for operand in computation.operands(instruction) for shape in operand.shapes]
    if kind == "collective-permute":
        found = re.search(r"source_target_pairs=\{(.*?\})\}", instruction.attributes)
        pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
        size, crosses = 2, any(slices[int(a)] != slices[int(b)] for a, b in pairs)
    else:
        groups = replica_groups(instruction.attributes, len(slices))
        size, crosses = groups.shape[1], bool((slices[groups] != slices[groups[:, :1]]).any())
    moved = _SENT[kind](size) * sum(shape.bytes for shape in operands)
    return Traffic(1.0, 0.0 if crosses else moved, moved if crosses else 0.0)
