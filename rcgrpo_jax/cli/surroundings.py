"""What a command changes of its process, and puts back: a caller of `main` keeps its logging, its streams, its JAX."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

QUIETER = {  # loggers that talk over the program, and the least level that is news
    "absl": logging.ERROR,
    "orbax": logging.ERROR,
    "asyncio": logging.CRITICAL,  # else each background task of a read that failed, whose error `main` prints
}
DEFAULTS = {"TF_CPP_MIN_LOG_LEVEL": "2", "TOKENIZERS_PARALLELISM": "false"}
COMPILERS = (  # variables that `plan` sets for the compilers of devices that are not here
    "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "ALLOW_MULTIPLE_LIBTPU_LOAD",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "XLA_FLAGS",
)  # fmt: skip
JAX_OPTIONS = ("jax_platforms", "jax_compilation_cache_dir", "jax_enable_preemption_service")  # that commands set


@contextmanager
def surroundings(debug: bool) -> Iterator[None]:
    """Logging to standard error, streams that can print any name, and, without `debug`, quieter libraries."""
    with ExitStack() as stack:
        stack.enter_context(logged(logging.DEBUG if debug else logging.WARNING))
        for stream in (sys.stdout, sys.stderr):
            stack.enter_context(printable(stream))
        stack.enter_context(variables({} if debug else DEFAULTS))
        if not debug:
            for name, level in QUIETER.items():
                stack.enter_context(quieter(logging.getLogger(name), level))
        yield


@contextmanager
def logged(level: int) -> Iterator[None]:
    """Writes what is logged to standard error, where the caller has not set up logging."""
    root = logging.getLogger()
    if root.handlers:
        yield
        return
    handler, before = logging.StreamHandler(), root.level
    handler.setFormatter(logging.Formatter("rcgrpo: %(message)s"))
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


@contextmanager
def printable(stream: object) -> Iterator[None]:
    """Has a text stream write what its encoding lacks, and file names that are not UTF-8, as backslash escapes."""
    if not hasattr(stream, "reconfigure"):  # the caller's own
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if not stream.closed:
            stream.reconfigure(errors=before)


@contextmanager
def quieter(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def variables(defaults: Mapping[str, str]) -> Iterator[None]:
    """Sets those environment variables that are not set; puts them and `COMPILERS` back."""
    before = {name: os.environ.get(name) for name in (*defaults, *COMPILERS)}
    os.environ.update({name: value for name, value in defaults.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def jax_options() -> Iterator[None]:
    """Puts back `JAX_OPTIONS`. Devices that JAX has opened stay those that it has."""
    import jax

    before = {name: getattr(jax.config, name) for name in JAX_OPTIONS}
    try:
        yield
    finally:
        for name, value in before.items():
            if getattr(jax.config, name) != value:
                jax.config.update(name, value)
