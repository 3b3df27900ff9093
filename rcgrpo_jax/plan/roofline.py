"""The least time that a program can take on a chip: of compute, memory and network, the slowest."""

from __future__ import annotations

from typing import NamedTuple

from rcgrpo_jax.plan.chips import Chip
from rcgrpo_jax.plan.cost import Cost


class Time(NamedTuple):
    """Seconds of each kind of work, as if nothing else were done; on the roofline they overlap entirely."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """What limits the program."""
        return max(self._fields, key=lambda name: getattr(self, name))


def roofline(cost: Cost, chip: Chip) -> Time:
    """FLOPs over the peak rate, bytes over the bandwidths; traffic inside and between slices one after the other."""
    return Time(cost.flops / chip.flops, cost.bytes / chip.hbm_bandwidth, cost.ici / chip.ici + cost.dcn / chip.dcn)
