"""A function of one sample over many: vmapped within a micro-batch that is spread over the mesh, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rcgrpo_jax.parallel.mesh import SAMPLE_AXES


def split(tree: Any, micro_batch: int, mesh: Mesh) -> Any:
    """`[S, ...]` leaves as `[S / m, m, ...]`, each micro-batch spread over `data` and `fsdp`; m = 0 means S.

    The S samples lie on the devices in blocks, in order, and a micro-batch takes a part of every block: no sample
    moves from one device to another.
    """
    spread, devices = NamedSharding(mesh, P(None, SAMPLE_AXES)), math.prod(mesh.shape[axis] for axis in SAMPLE_AXES)

    def one(x: jax.Array) -> jax.Array:
        m = micro_batch or x.shape[0]
        blocks = x.reshape(devices, x.shape[0] // m, m // devices, *x.shape[1:])
        return jax.lax.with_sharding_constraint(blocks.swapaxes(0, 1).reshape(-1, m, *x.shape[1:]), spread)

    return jax.tree.map(one, tree)


def join(tree: Any, mesh: Mesh) -> Any:
    """The inverse of `split`: `[S / m, m, ...]` leaves as `[S, ...]`, spread likewise."""
    spread, devices = NamedSharding(mesh, P(SAMPLE_AXES)), math.prod(mesh.shape[axis] for axis in SAMPLE_AXES)

    def one(x: jax.Array) -> jax.Array:
        blocks = x.reshape(x.shape[0], devices, x.shape[1] // devices, *x.shape[2:])
        return jax.lax.with_sharding_constraint(blocks.swapaxes(0, 1).reshape(-1, *x.shape[2:]), spread)

    return jax.tree.map(one, tree)


def accumulate(
    gradients: Callable[..., tuple[Any, Any]], samples: tuple, micro_batch: int, mesh: Mesh
) -> tuple[Any, Any]:
    """Mean gradients of samples that are differentiated micro-batch by micro-batch.

    Args:
        gradients: (micro-batch of each of `samples`) -> mean gradients, and aux with a leading axis of samples.
        samples: Trees with a leading axis S.
        micro_batch: As for `split`.
        mesh: The mesh.

    Returns:
        The gradients' mean over all samples, and the aux of all, `[S, ...]`.
    """
    chunks = split(samples, micro_batch, mesh)
    count = jax.tree.leaves(chunks)[0].shape[0]
    if count == 1:  # no loop: XLA's CPU compiler makes a convolution's gradient ten times slower inside one
        return gradients(*jax.tree.map(lambda x: x[0], chunks))

    def add(total: Any, chunk: tuple) -> tuple[Any, Any]:
        new, aux = gradients(*chunk)
        return jax.tree.map(lambda a, b: a + b / count, total, new), aux

    shapes = jax.eval_shape(lambda chunk: gradients(*chunk)[0], jax.tree.map(lambda x: x[0], chunks))
    zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
    total, aux = jax.lax.scan(add, zeros, chunks)
    return total, join(aux, mesh)


def map_samples(function: Callable[..., Any], samples: tuple, micro_batch: int, mesh: Mesh) -> Any:
    """`function` of every sample, as `jax.vmap` would give it, with at most `micro_batch` samples in memory.

    Args:
        function: Pure function of one sample's trees; what it closes over is shared.
        samples: Its arguments, every leaf with a leading axis S.
        micro_batch: Samples at a time over the whole mesh, a divisor of S and a multiple of data x fsdp; 0: all.
        mesh: The mesh. The function must hold its own activations (`models.mmdit.keep_whole`): constraints gain the
            spread of the mapped axis, and without any the compiler follows the weights and gives the spread up.

    Returns:
        The results, stacked along a leading axis S.
    """
    mapped = jax.vmap(function, spmd_axis_name=SAMPLE_AXES)
    chunks = split(samples, micro_batch, mesh)
    return join(jax.lax.map(lambda chunk: mapped(*chunk), chunks), mesh)
