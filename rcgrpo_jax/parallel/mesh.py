"""The device mesh: `data` and `fsdp` spread samples, `fsdp` also spreads weights, `tensor` spreads heads and MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from rcgrpo_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor")
SAMPLE_AXES = ("data", "fsdp")


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """The size of each of `AXES`; one axis may be -1 and takes the devices that are left.

    Raises:
        UsageError: If the sizes do not multiply to the number of devices.
    """
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    wanted = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UsageError(
            f"mesh: {wanted}; sizes are positive, and at most one may be -1.", "Set the others to whole numbers."
        )
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and num_devices % known == 0:
        shape[shape.index(-1)] = num_devices // known
    if math.prod(shape) != num_devices:
        raise UsageError(
            f"mesh: {wanted} does not multiply to the {num_devices} devices found.",
            f"Choose sizes whose product is {num_devices}, or set one of them to -1.",
        )
    return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or those given), axes `AXES`, all Auto: the compiler places what is not constrained.

    Args:
        sizes: Devices along each axis; a missing axis is 1, one may be -1.
        devices: Devices to use; all of `jax.devices()` by default. Those of a process are put side by side, so that
            each has whole rows of a batch.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: device.process_index)
    shape = mesh_shape(sizes, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_parts(mesh: Mesh, heads: int) -> None:
    """Refuses a mesh that splits a sample over processes or a head over devices, or where a process has no block.

    Args:
        mesh: As `make_mesh` gives it.
        heads: Attention heads of the model.

    Raises:
        UsageError: With the nearest size that is right.
    """
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    own, (data, fsdp, tensor) = mesh.size // len(np.unique(processes)), mesh.devices.shape
    if np.any(processes != processes[..., :1]):
        raise UsageError(
            f"config: mesh.tensor: {tensor}; a process has {own} devices, and the parts of a sample must lie within "
            "one.",
            f"Choose a divisor of {own}.",
        )
    if heads % tensor:
        raise UsageError(
            f"config: mesh.tensor: {tensor}; the model has {heads} heads.", f"Choose a divisor of {heads}."
        )
    if not _in_blocks(processes):
        rows = data * fsdp
        sizes = sorted(
            (size for size in range(1, rows + 1) if rows % size == 0),
            key=lambda size: (max(size, fsdp) / min(size, fsdp), -size),
        )
        near = next(size for size in sizes if _in_blocks(processes.reshape(-1, size, tensor)))
        raise UsageError(
            f"config: mesh.fsdp: {fsdp}; a process has {own} devices, and they must form a block of the mesh, here "
            f"data={data}, fsdp={fsdp}, tensor={tensor}.",
            f"Choose mesh.data={rows // near} and mesh.fsdp={near}.",
        )


def _in_blocks(processes: np.ndarray) -> bool:
    """Whether the places of every process form a box: `Mesh.local_mesh` is made of nothing else."""
    places = (np.argwhere(processes == process) for process in np.unique(processes))
    return all(np.prod(np.ptp(own, axis=0) + 1) == len(own) for own in places)
