"""GPUs that are not there: the CUDA compiler of jax needs a description of the card, and no driver."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.plan.chips import Chip

# What training sets on GPUs, where the user has not (launch/lib_worker.sh): overlap of transfers and products, matrix
# products by cuBLAS alone, and the share of a card's memory that JAX takes at its start.
XLA_FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_triton_gemm=false"
MEMORY_FRACTION = "0.92"

_CARD = """
gpu_device_info {{
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} {accelerated} }}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory} l2_cache_size: {l2}
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_optin} shared_memory_per_block: 49152
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {threads}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}"
"""


def memory_fraction() -> float:
    """The share of a card's memory that programs may use.

    Raises:
        UsageError: If the user's is no number.
    """
    found = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    try:
        return float(found)
    except ValueError:
        raise UsageError(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION: {found!r} found; a number was wanted.", "Unset it, or write 0.92, say."
        ) from None


@contextmanager
def cudnn_errors() -> Iterator[None]:
    """Turns JAX's missing cuDNN, whose version it asks for where a program is traced, into a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("cuDNN"):
            raise
        raise UserError(
            f"model.attention: cudnn needs cuDNN, also to be compiled ({error}).",
            "Run `pip install 'jax[cuda12]'`, which brings it, or set model.attention=xla.",
        ) from None


def describe(name: str, chip: Chip, nodes: int, cards: int) -> tuple[jax.Device, ...]:
    """Devices of `nodes` machines of `cards` GPUs each, for the compiler alone.

    Raises:
        UserError: If jax's CUDA plugin is not installed, or cannot be used.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(
            f"--topology: {name} needs the GPU compiler, and jax's CUDA plugin is not installed.",
            "Run `pip install 'jax[cuda12]'`, of the version that jax has; it needs no GPU.",
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it would look for a driver
    os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
    from jax.experimental import topologies

    card = _CARD.format(
        kind=chip.kind, bandwidth=chip.hbm_bandwidth, **chip.card._asdict(),
        accelerated="feature_extension: ACCELERATED_FEATURES" if chip.card.capability >= (9, 0) else "",
    )  # fmt: skip
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=card, topology=f"{nodes}x1x{cards}")
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--topology: {name}: the GPU compiler cannot be used ({reason}).",
            "Install jax and its CUDA plugin in the same version: `pip install 'jax[cuda12]'`.",
        ) from None
    return tuple(found.devices)
