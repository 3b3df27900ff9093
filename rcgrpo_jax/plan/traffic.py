"""How many bytes one instruction of a compiled program moves to and from HBM."""

from __future__ import annotations

from rcgrpo_jax.plan.hlo import Computation, Instruction, Shape

# They name data, or their work is counted elsewhere.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "async-start", "async-update", "opt-barrier", "domain",
}  # fmt: skip
_BUFFERS = ("AllocateBuffer", "AsyncCollective", "ConcatBitcast")  # custom calls that only hand memory around
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    """Bytes read and written by one instruction.

    Operands count once, as far as they are read: a slice of the stacked weights of all layers counts as a slice, and
    an update in place counts as what is written. What lies in on-chip memory is free.
    """
    opcode, operands = instruction.opcode, computation.operands(instruction)
    if opcode in _FREE or opcode.endswith("-done") or any(name in instruction.attributes for name in _BUFFERS):
        return 0.0
    if opcode == "fusion":
        inner = computations[instruction.called("calls")]
        reads = (
            min(_hbm(operand.shapes), _read(inner, inner.parameters[i], computations))
            for i, operand in enumerate(operands)
            if _hbm(operand.shapes)
        )
        return sum(reads) + min(_hbm(instruction.shapes), _written(inner, inner.root))
    if opcode in _SLICES:
        return 2 * _hbm(instruction.shapes) if _hbm(operands[0].shapes) else _hbm(instruction.shapes)
    if opcode == "dynamic-update-slice":
        return 2 * _size(operands[1].shapes) if _hbm(instruction.shapes) else 0.0
    if opcode in ("slice-start", "dynamic-slice-start"):  # (whole operand, slice, context)
        return _size(instruction.shapes[1:2])
    if opcode.endswith("-start"):  # the result holds the source too
        return _hbm(instruction.shapes)
    return _hbm(instruction.shapes) + sum(_hbm(operand.shapes) for operand in operands)


def _hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _size(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes)


def _read(computation: Computation, source: Instruction, computations: dict[str, Computation]) -> float:
    """Bytes of `source` that its users in a fusion read."""
    total = 0.0
    for user in computation.users[source.name]:
        if user.opcode in _SLICES and user.operands[0] == source.name:
            total += _size(user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue  # written in place
        elif user.opcode == "bitcast":
            total += _read(computation, user, computations)
        elif user.opcode == "fusion":
            inner = computations[user.called("calls")]
            at = [i for i, name in enumerate(user.operands) if name == source.name]
            total += sum(_read(inner, inner.parameters[i], computations) for i in at)
        else:
            return _size(source.shapes)
    return total


def _written(computation: Computation, result: Instruction) -> float:
    """Bytes that a fusion writes as `result`."""
    if result.opcode == "dynamic-update-slice":
        return _size(computation.operands(result)[1].shapes)
    if result.opcode in ("bitcast", "tuple"):
        return sum(_written(computation, operand) for operand in computation.operands(result))
    return _size(result.shapes)
