"""The devices of a plan: TPUs or GPUs that are not there, by a compiler's description of them, or the local ones."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
import numpy as np

from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.plan import gpu
from rcgrpo_jax.plan.chips import GPUS, TPUS, Chip, chip_of

MOST_CHIPS = 100_000  # more than any pod has; the compiler describes each
_FORMS = (
    "Write a TPU slice by its sides (v5e:4x4, v5p:4x4x4), a node by its GPUs (h100:8), 2*v5e:4x4 or 2*h100:8 for two, "
    "or local."
)


class Topology(NamedTuple):
    """Devices to plan for."""

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None  # None if its figures are not known
    memory: int | None  # bytes that a program may use on a device; None if not known

    @property
    def slices(self) -> np.ndarray:
        """The slice of each TPU or node of each GPU, `[devices]` int; between them is only the data-centre network."""
        index = "process_index" if self.devices[0].platform == "gpu" else "slice_index"
        return np.asarray([getattr(device, index, None) or 0 for device in self.devices])

    @property
    def chips(self) -> int:
        return len(self.devices) // (self.chip.devices if self.chip else 1)


def open_topology(name: str) -> Topology:
    """The devices that a name stands for.

    Args:
        name: `local`, a TPU slice such as `v5e:4x4`, a node of GPUs such as `h100:8`, or several of one, `2*v5e:4x4`.

    Raises:
        UsageError: If the name is not one of these.
        UserError: If the compiler is not installed or refuses the shape.
    """
    if name == "local":
        devices = tuple(jax.devices())
        return Topology(name, devices, chip_of(devices[0].device_kind), _memory(devices[0]))
    found = re.fullmatch(r"(?:([1-9][0-9]{0,5})\*)?(\w+):([1-9][0-9]{0,5}(?:x[1-9][0-9]{0,5})*)", name)
    if not found or found[2] not in TPUS | GPUS:
        raise UsageError(f"--topology: {name!r} found; chips are {', '.join(TPUS | GPUS)}.", _FORMS)
    slices, chip, shape = int(found[1] or 1), (TPUS | GPUS)[found[2]], [int(side) for side in found[3].split("x")]
    if len(shape) != (chip.axes or 1):
        what = f"{chip.name} slices have {chip.axes}" if chip.axes else f"of {chip.name} it is a number"
        raise UsageError(f"--topology: {name!r} has {len(shape)} sides; {what}.", _FORMS)
    if (count := slices * math.prod(shape)) > MOST_CHIPS:
        raise UsageError(f"--topology: {name!r} has {count} chips; at most {MOST_CHIPS} can be planned for.", _FORMS)
    if chip.card:
        devices = gpu.describe(name, chip, slices, shape[0])
        return Topology(name, devices, chip, int(gpu.memory_fraction() * chip.card.memory))
    return Topology(name, _describe(name, f"{chip.name}:{found[3]}", shape, slices), chip, chip.memory)


def _describe(name: str, slice_name: str, shape: list[int], slices: int) -> tuple[jax.Device, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology: {name} needs the TPU compiler, and libtpu is not installed.",
            "Run `pip install libtpu`, of the version that jax's extra `tpu` names; it needs no TPU.",
        )
    # Without these libtpu asks Google's metadata server what machine it is on, and complains at length.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    if slice_name.startswith("v4:"):  # a chip's two cores are one device, as on a TPU VM; of later chips by default
        options["chip_config_name"] = "megacore"
    if shape in ([1, 1], [1, 1, 1], [2, 4]):  # one machine: v5e and v6e have up to eight chips, in larger slices four
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    try:
        return tuple(topologies.get_topology_desc(topology_name=slice_name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--topology: {name} is no slice that the compiler knows ({reason}).", _FORMS) from None


def _memory(device: jax.Device) -> int | None:
    return (device.memory_stats() or {}).get("bytes_limit")
