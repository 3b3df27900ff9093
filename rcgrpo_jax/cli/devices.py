"""The devices that a command computes on: opened, named in a line, or left to a run."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections import Counter

import jax

REMEDIES = {  # beginning of a message of JAX -> the way out
    "An NVIDIA GPU": "pip install -e '.[cuda]'",
    "CUDA backend": "see that `nvidia-smi` lists it, with free memory",
    "A Google TPU": "pip install -e '.[tpu]', and let no other process hold it",
}

logger = logging.getLogger(__name__)


class _Messages(logging.Handler):
    """Keeps the messages that are logged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def open_devices() -> list[jax.Device]:
    """Opens JAX's devices, all of a run's, and names them in a line on standard error.

    JAX takes the CPU where it cannot use the GPU or TPU that it sees, unless JAX_PLATFORMS is set, and says so in its
    log: here with the way out. Of several processes the first one speaks.
    """
    said, log = _Messages(), logging.getLogger("jax")
    log.addHandler(said)
    propagated, log.propagate = log.propagate, False
    try:
        devices = jax.devices()
    finally:
        log.propagate = propagated
        log.removeHandler(said)
    if jax.process_index() == 0:
        print(f"devices: {describe(devices)}", file=sys.stderr, flush=True)
        for text in said.texts:
            remedy = next((remedy for sign, remedy in REMEDIES.items() if text.startswith(sign)), None)
            way_out = f" To use it: {remedy}. JAX_PLATFORMS=cpu says that the CPU is meant." if remedy else ""
            logger.warning("%s%s", text, way_out)
    return devices


def describe(devices: list[jax.Device]) -> str:
    """How many there are of which kind, such as `8 x TPU v5 lite` or `1 x cpu (x86_64)`."""
    kinds = Counter(
        f"cpu ({platform.machine()})" if device.platform == "cpu" else device.device_kind for device in devices
    )
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    processes = len({device.process_index for device in devices})
    return text if processes == 1 else f"{text} in {processes} processes"


def leave_devices_alone() -> None:
    """Has JAX compute on the CPU, unless JAX_PLATFORMS says where: a run may have the accelerator to itself.

    Without effect once JAX has computed something.
    """
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
