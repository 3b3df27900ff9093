"""What the vendors say of their accelerators, per device as JAX counts devices.

Peak bfloat16 rate, memory bandwidth, interconnect (ICI) and data-centre network (DCN) of TPUs are from Google's pages
docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; of v4 the pages give no DCN, and v5e's is taken for it. Google
states the ICI of a chip in both directions over all links; `ici` is what a device sends along *one axis* of the torus,
both ways round, since a collective over one mesh axis mostly has one axis: the stated figure over the number of links.
Memory is what the TPU compiler lets a program use, read from its refusal of a larger one (libtpu 0.0.42). NVIDIA's are
from the data sheets of the SXM modules (dense rates; `ici` is NVLink one way, `dcn` the InfiniBand port of a DGX) and
the Ada whitepaper (GeForce; `ici` is PCIe 4.0 x16 one way, `dcn` 10 Gbit Ethernet); what the compiler asks of a card
besides are the figures that CUDA reports of it, as OpenXLA publishes them (xla/backends/gpu/target_config/specs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GIB = 2**30


class Card(NamedTuple):
    """What the GPU compiler wants to know of a card."""

    capability: tuple[int, int]  # CUDA's
    cores: int  # streaming multiprocessors
    fpus: int  # fp32 lanes of one
    threads: int  # of one, at most
    shared: int  # bytes of shared memory of one
    shared_optin: int  # bytes of it that a block may take
    l2: int  # bytes
    clock: float  # GHz
    memory: int  # bytes in all


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator; all figures are per device."""

    name: str  # as users write it
    kind: str  # part of JAX's `device_kind`
    flops: float  # peak, bfloat16 FLOP/s
    hbm_bandwidth: float  # bytes/s
    ici: float  # bytes/s sent along one axis of the interconnect
    dcn: float  # bytes/s sent between slices or nodes
    memory: int = 0  # bytes that a program may use; of a GPU a share of the card's (`plan.gpu`)
    axes: int = 0  # dimensions of a TPU's torus; 0: no TPU
    devices: int = 1  # devices that JAX sees in a chip
    card: Card | None = None  # of a GPU


_A100 = Card((8, 0), 108, 64, 2048, 167936, 166912, 40 * 2**20, 1.41, 85100068864)
_H100 = Card((9, 0), 132, 128, 2048, 233472, 232448, 50 * 2**20, 1.98, 84942979072)
_RTX4090 = Card((8, 9), 128, 128, 1536, 102400, 101376, 72 * 2**20, 2.52, 24 * GIB)

CHIPS = (
    Chip("v4", "TPU v4", 275e12, 1.2e12, 100e9, 3.1e9, int(30.75 * GIB), axes=3),
    Chip("v5e", "TPU v5 lite", 197e12, 0.819e12, 100e9, 3.1e9, int(15.75 * GIB), axes=2),
    Chip("v5p", "TPU v5", 459e12, 2.765e12, 200e9, 6.2e9, int(95.74 * GIB), axes=3),
    Chip("v6e", "TPU v6 lite", 918e12, 1.638e12, 200e9, 12.5e9, int(31.25 * GIB), axes=2),
    # JAX sees its two cores as two devices: half a chip's figures each.
    Chip("tpu7x", "TPU7x", 1153.5e12, 3.69e12, 100e9, 6.2e9, int(94.75 * GIB), axes=3, devices=2),
    Chip("a100", "NVIDIA A100-SXM4-80GB", 312e12, 2.039e12, 300e9, 25e9, card=_A100),
    Chip("h100", "NVIDIA H100 80GB HBM3", 989e12, 3.35e12, 450e9, 50e9, card=_H100),
    Chip("h200", "NVIDIA H200", 989e12, 4.8e12, 450e9, 50e9, card=_H100._replace(memory=151397597184)),
    Chip("rtx4090", "NVIDIA GeForce RTX 4090", 165.2e12, 1.008e12, 32e9, 1.25e9, card=_RTX4090),
)
TPUS = {chip.name: chip for chip in CHIPS if chip.axes}
GPUS = {chip.name: chip for chip in CHIPS if chip.card}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, or None if it is not listed (a CPU, for one)."""
    found = [chip for chip in CHIPS if chip.kind in device_kind]
    return max(found, key=lambda chip: len(chip.kind), default=None)  # "TPU v5 lite" is no "TPU v5"
