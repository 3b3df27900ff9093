"""Orbax's V1 interface under the one name `ocp`, wherever the installed release keeps it."""

import logging

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:
    from orbax.checkpoint.experimental import v1 as ocp

__all__ = ["is_of_files", "loading", "ocp", "saving"]

_SLICE_BYTES = 1 << 20  # from here on replicas of an array share its writing: each slice is a program to compile

_NOT_OF_FILES = (  # XLA's statuses, and a device that is taken
    "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "ABORTED", "CANCELLED", "Unable to initialize backend",
)  # fmt: skip


def saving() -> ocp.Context:
    """The settings of a save."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = _SLICE_BYTES
    return context


def loading() -> ocp.Context:
    """The settings of a load: what is wanted decides, also where the files have no place for a field that is empty."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context


def is_of_files(error: BaseException | None) -> bool:
    """Whether a failure to read says something of the files, and not of devices or of other processes."""
    while error is not None:
        if isinstance(error, RuntimeError) and str(error).startswith(_NOT_OF_FILES):  # XLA's errors are such too
            return False
        error = error.__cause__ or error.__context__
    return True


def _is_not_repeated(record: logging.LogRecord) -> bool:
    """False for the tracebacks that every background thread of a failed save logs, hundreds of lines in all.

    The same exception is raised again on the main thread, where it becomes one error for the user.
    """
    return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_is_not_repeated)
