"""Orbax's V1 interface under the one name `ocp`, wherever the installed release keeps it."""

import logging

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:
    from orbax.checkpoint.experimental import v1 as ocp

__all__ = ["ocp"]


def _is_not_repeated(record: logging.LogRecord) -> bool:
    """False for the tracebacks that every background thread of a failed save logs, hundreds of lines in all.

    The same exception is raised again on the main thread, where it becomes one error for the user.
    """
    return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_is_not_repeated)
