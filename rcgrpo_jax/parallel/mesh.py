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
