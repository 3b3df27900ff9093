"""Several processes as one run: joining them, sharing the rows of a batch among them, and moving arrays between them.

All functions can be called in a run of one process too. Those that communicate do nothing there.
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

from rcgrpo_jax.errors import UsageError, UserError, mark_everywhere, reason
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES
from rcgrpo_jax.parallel.slurm import slurm_tasks, whole_number

VARIABLES = {
    "coordinator": "RCGRPO_COORDINATOR",
    "num_processes": "RCGRPO_NUM_PROCESSES",
    "process_id": "RCGRPO_PROCESS_ID",
}
CAUSE_BYTES = 400  # length to which the message of an error is cut before it is sent to the other processes


def initialize(given: Mapping[str, str | None], environ: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a run. It must be called before JAX computes anything.

    The first of these that applies says which processes there are: the arguments, or the environment variables of
    `VARIABLES`; a Slurm step of several tasks; a TPU VM, whose workers find each other. If none applies, the process is
    a run by itself.

    Args:
        given: `coordinator` (HOST:PORT of process 0), `num_processes` and `process_id`, or None where not given.
        environ: Environment variables.

    Raises:
        UsageError: Some of the three values are missing or wrong.
        UserError: The other processes could not be reached.
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
    """Whether this is process 0, which alone writes the files that a run writes once."""
    return jax.process_index() == 0


def local_row_range(count: int) -> range:
    """The rows of a global batch that this process reads, decodes and scores.

    Each process has one block of rows, in the order of the processes.

    Args:
        count: Rows of the global batch, a multiple of the number of processes.
    """
    share = count // jax.process_count()
    return range(jax.process_index() * share, (jax.process_index() + 1) * share)


def local_job_range(count: int) -> range:
    """The numbers of the jobs that this process does, of `count` in all: every n-th, for n processes."""
    return range(jax.process_index(), count, jax.process_count())


def gather(tree: Any) -> Any:
    """Concatenates the rows of all processes, on every process.

    Args:
        tree: Host arrays `[n, ...]`, this process' rows.

    Returns:
        Host arrays `[n x processes, ...]`, in the order of the processes.
    """
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(np.asarray(x), tiled=True)), tree)


def sum_over_processes(x: np.ndarray) -> np.ndarray:
    """Sums an array over the processes; every process gets the sum."""
    return gather(x[None]).sum(0, dtype=x.dtype)


def any_process(flag: bool) -> bool:
    """Whether the flag is true on at least one process; every process gets the same answer."""
    return bool(gather(np.array([flag])).any())


@contextmanager
def raise_together() -> Iterator[None]:
    """Raises an error on every process if the block raises one on any of them.

    Without it the other processes would wait for ever for the one that has failed. The block must hold no collective
    operation.

    Raises:
        UserError: On the processes whose block did not fail. It names a process that failed, and the cause.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    causes = gather(_cause(error)[None])
    if isinstance(error, UserError) and jax.process_count() > 1:
        raise mark_everywhere(type(error)(f"process {jax.process_index()}: {error.problem}", error.remedy)) from error
    if error is not None:
        raise mark_everywhere(error)
    if (failed := np.flatnonzero(causes.any(axis=1))).size:
        cause = causes[failed[0]].tobytes().rstrip(b"\0").decode(errors="ignore")
        stops = UserError(
            f"process {failed[0]} failed, so this one stops: {cause}",
            "Its own log says more. The same command on all processes resumes from the last checkpoint.",
        )
        raise mark_everywhere(stops)


def _cause(error: Exception | None) -> UInt8[np.ndarray, " bytes"]:
    """The message of an error as `CAUSE_BYTES` bytes, padded with zeros; only zeros if there is no error."""
    text = (
        "" if error is None else error.problem if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    )
    line = " ".join(text.split()).encode(errors="replace")  # file names need not be Unicode
    return np.frombuffer(line[:CAUSE_BYTES].ljust(CAUSE_BYTES, b"\0"), np.uint8)


def text_of_main(text: str) -> str:
    """Sends the text of process 0 to every process, and returns it."""
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(gather(np.array([own.size])).max())
    return from_main(np.pad(own, (0, size - own.size))).tobytes().rstrip(b"\0").decode()


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, on every process, in the order of the processes."""
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(gather(np.array([own.size])).max())
    return [row.tobytes().rstrip(b"\0").decode() for row in gather(np.pad(own, (0, size - own.size))[None])]


def from_main(tree: Any) -> Any:
    """Sends the host arrays of process 0 to every process, and returns them; the others give arrays of equal shapes."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


@contextmanager
def report_lost_process() -> Iterator[None]:
    """Turns the failure of a collective operation in the block into a `UserError`: another process has ended.

    An error for lack of memory passes as it is.

    Raises:
        UserError: A collective operation failed, in a run of several processes.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise UserError(
            f"process {jax.process_index()}: another process is gone ({reason(error)}).",
            "Its own log says why. The same command on all processes resumes from the last checkpoint.",
        ) from error


def exit_at_once(code: int) -> None:
    """Ends this process at once if the run has several; does nothing if it has one.

    An orderly exit would wait for the other processes, which may have ended.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def to_host(tree: Any) -> Any:
    """Copies arrays on the mesh to the host; every process gets them whole."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def local_rows(x: jax.Array, mesh: Mesh) -> jax.Array:
    """This process' rows of an array on the mesh, as an array on its own devices. Nothing is copied.

    Args:
        x: `[S, ...]` on the mesh, the first axis spread over `data` and `fsdp`.
        mesh: The mesh of all processes.

    Returns:
        `[S / processes, ...]` on the devices of this process.
    """
    if jax.process_count() == 1:
        return x
    sharding = NamedSharding(mesh.local_mesh, P(SAMPLE_AXES))
    shape = (x.shape[0] // jax.process_count(), *x.shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding, [shard.data for shard in x.addressable_shards])


def to_mesh(tree: Any, mesh: Mesh, spec: P | None = None) -> Any:
    """Copies host arrays to the mesh.

    Args:
        tree: Arrays. If `spec` spreads an axis over the processes, each gives its own rows; otherwise all give equal
            arrays.
        mesh: The mesh of all processes.
        spec: How the arrays are spread; by default every device holds them whole.
    """
    sharding = NamedSharding(mesh, P() if spec is None else spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def rows_to_mesh(tree: Any, mesh: Mesh) -> Any:
    """Joins the rows of all processes into arrays on the mesh; each row lies on the devices of its process.

    Args:
        tree: Host arrays `[n, ...]`, this process' rows.
        mesh: The mesh of all processes, as `parallel.mesh.make_mesh` orders it.
    """
    processes = Mesh(mesh.devices.reshape(jax.process_count(), -1), ("process", "device"))
    return to_mesh(tree, processes, P("process"))
