"""Several processes as one run: how they find each other, which rows each of them reads, and how they agree.

All functions hold for one process too, where they do nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8

from rcgrpo_jax.errors import UsageError, UserError, everywhere, reason
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES
from rcgrpo_jax.parallel.slurm import slurm_tasks, whole_number

VARIABLES = {
    "coordinator": "RCGRPO_COORDINATOR",
    "num_processes": "RCGRPO_NUM_PROCESSES",
    "process_id": "RCGRPO_PROCESS_ID",
}
CAUSE_BYTES = 400  # of an error, that the other processes are told


def initialize(given: Mapping[str, str | None], environ: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a run; must come before JAX computes anything.

    In this order: what was given, or stands in `VARIABLES`; a Slurm step of several tasks; a TPU VM, whose workers find
    each other. Otherwise the process is alone.

    Args:
        given: `coordinator` (HOST:PORT of process 0), `num_processes` and `process_id`, or None where not given.
        environ: Environment variables.

    Raises:
        UsageError: Some of the three are missing or wrong.
        UserError: The others did not come.
    """
    given = {name: given.get(name) or environ.get(variable) for name, variable in VARIABLES.items()}
    if any(given.values()):
        options = _explicit(given)
    elif slurm_tasks(environ) > 1:
        options = {"cluster_detection_method": "slurm"}
    elif any(os.path.exists(f"/dev/{device}") for device in ("accel0", "vfio/0")) and _has_libtpu():
        options = {}
    else:
        return
    # JAX's service would take SIGTERM for itself, from now on; `runs.run.termination` answers to it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError, OSError) as error:  # OSError: a TPU without Google's metadata server
        raise UserError(
            f"distributed: {given['coordinator'] or 'the processes of this job'}: {reason(error)}",
            "Start the same command on every process, and let each reach the first one's port; a process that is alone "
            "can say so: --coordinator=localhost:8476 --num_processes=1 --process_id=0.",
        ) from None


def _explicit(given: Mapping[str, str | None]) -> dict[str, Any]:
    if missing := [name for name, value in given.items() if not value]:
        raise UsageError(
            f"--{', --'.join(name for name, value in given.items() if value)} given, --{', --'.join(missing)} not.",
            f"Give all three, or set {', '.join(VARIABLES.values())}.",
        )
    coordinator, *numbers = given.values()
    count, index = map(whole_number, numbers)
    if count is None or index is None or index >= count or ":" not in coordinator:
        raise UsageError(
            f"--coordinator: {coordinator}, --num_processes: {numbers[0]}, --process_id: {numbers[1]} found; HOST:PORT "
            "and a number below the count were wanted.",
            "Processes are numbered from 0; HOST:PORT is that of process 0.",
        )
    # Inside Slurm or Open MPI, JAX would take one device a process by itself.
    options = {"cluster_detection_method": "deactivate"}
    return options | {"coordinator_address": coordinator, "num_processes": count, "process_id": index}


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def own_rows(count: int) -> range:
    """The rows of a global batch that this process reads, decodes and scores; the processes' rows follow each other.

    Args:
        count: Rows in all, a multiple of the number of processes.
    """
    share = count // jax.process_count()
    return range(jax.process_index() * share, (jax.process_index() + 1) * share)


def own_share(count: int) -> range:
    """The part of `count` jobs that this process does; any count will do."""
    return range(jax.process_index(), count, jax.process_count())


def gather(tree: Any) -> Any:
    """Host arrays of every process' rows `[n, ...]`, joined on every process in the order of the processes."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(np.asarray(x), tiled=True)), tree)


def total(x: np.ndarray) -> np.ndarray:
    """The sum over the processes of an array that each of them has, on every process."""
    return gather(x[None]).sum(0, dtype=x.dtype)


def anyone(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return bool(gather(np.array([flag])).any())


@contextmanager
def together() -> Iterator[None]:
    """Ends on every process with an error if the block ends on one of them with one: nobody waits for who is gone.

    The block must hold no collective operation.

    Raises:
        UserError: On the processes whose own block did not fail; it names the process that did, and the cause.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    causes = gather(_cause(error)[None])
    if isinstance(error, UserError) and jax.process_count() > 1:
        raise everywhere(type(error)(f"process {jax.process_index()}: {error.problem}", error.remedy)) from error
    if error is not None:
        raise everywhere(error)
    if (failed := np.flatnonzero(causes.any(axis=1))).size:
        cause = causes[failed[0]].tobytes().rstrip(b"\0").decode(errors="ignore")
        stops = UserError(
            f"process {failed[0]} failed, so this one stops: {cause}",
            "Its own log says more. The same command on all processes resumes from the last checkpoint.",
        )
        raise everywhere(stops)


def _cause(error: Exception | None) -> UInt8[np.ndarray, " bytes"]:
    """One line about an error, as many bytes for any: zeros after its end, nothing else where there is no error."""
    text = (
        "" if error is None else error.problem if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    )
    line = " ".join(text.split()).encode(errors="replace")  # file names need not be Unicode
    return np.frombuffer(line[:CAUSE_BYTES].ljust(CAUSE_BYTES, b"\0"), np.uint8)


def text_of_main(text: str) -> str:
    """The text of process 0, on every process."""
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(gather(np.array([own.size])).max())
    return from_main(np.pad(own, (0, size - own.size))).tobytes().rstrip(b"\0").decode()


def from_main(tree: Any) -> Any:
    """The host arrays of process 0, on every process; the others give arrays of the same shapes."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


@contextmanager
def watch() -> Iterator[None]:
    """Says so when a collective operation fails because another process is gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise UserError(
            f"process {jax.process_index()}: another process is gone ({reason(error)}).",
            "Its own log says why. The same command on all processes resumes from the last checkpoint.",
        ) from error


def leave(code: int) -> None:
    """Ends this process at once where there are others: an orderly end would wait for them, and they may be gone."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fetch(tree: Any) -> Any:
    """Arrays on the mesh as whole host arrays, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def spread_rows(x: jax.Array, mesh: Mesh) -> jax.Array:
    """This process' rows of an array whose first axis is spread over `data` and `fsdp`, on its own devices, uncopied.

    Args:
        x: `[S, ...]` on the mesh.
        mesh: The mesh of all processes.
    """
    if jax.process_count() == 1:
        return x
    sharding = NamedSharding(mesh.local_mesh, P(SAMPLE_AXES))
    shape = (x.shape[0] // jax.process_count(), *x.shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding, [shard.data for shard in x.addressable_shards])


def put(tree: Any, mesh: Mesh, spec: P | None = None) -> Any:
    """Host arrays as arrays on the mesh.

    Args:
        tree: Arrays. Where `spec` spreads an axis over the processes, each gives its own rows, else all give the same.
        mesh: The mesh of all processes.
        spec: Where they lie; every device holds them whole by default.
    """
    sharding = NamedSharding(mesh, P() if spec is None else spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Host arrays `[n, ...]` of every process' own rows as arrays of all rows, which lie on their process' devices.

    Args:
        tree: Arrays.
        mesh: The mesh of all processes, as `parallel.mesh.make_mesh` orders it.
    """
    processes = Mesh(mesh.devices.reshape(jax.process_count(), -1), ("process", "device"))
    return put(tree, processes, P("process"))
