"""One process a framework: neither sees the other's threads, allocator or, where a GPU has no room for two, weights."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from benchmarks.presets import Preset
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.plan import gpu

MATMUL = {"cpu": 2048, "gpu": 8192}  # side of the matrices whose product shows a device's peak


def best_rate(multiply: Callable[[], Any], side: int, tries: int = 10) -> float:
    """FLOP/s of the fastest of several products of two square matrices, after one to warm up."""
    seconds = [_seconds(multiply)[1] for _ in range(tries + 1)][1:]
    return 2 * side**3 / min(seconds)


def _seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started


class Failure(NamedTuple):
    """Why a process could not answer."""

    problem: str
    remedy: str


def serve(connection: Connection, framework: str, preset: Preset) -> None:
    """Builds a framework's `Step` and calls the methods that are asked for; answers (result, seconds) or a failure."""
    try:
        step = importlib.import_module(f"benchmarks.{framework}_step").Step(preset)
        first = step.results()  # the first step compiles, and both frameworks must agree on it
        while command := connection.recv():
            connection.send((first, 0.0) if command == "results" else _seconds(getattr(step, command)))
    except UserError as error:
        connection.send(Failure(error.problem, error.remedy))
    except Exception as error:
        traceback.print_exc()
        problem = f"{framework}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        connection.send(Failure(problem, "The lines above say where; if memory ran out, lower the micro-batches."))


class Workers:
    """The frameworks' processes, started when they are first asked.

    Args:
        preset: With `alone`, one process ends before another starts.
    """

    def __init__(self, preset: Preset):
        self.preset = preset
        self.running: dict[str, tuple[BaseProcess, Connection]] = {}

    def __enter__(self) -> Workers:
        self.compiled = tempfile.TemporaryDirectory()  # a process that starts again need not compile again
        return self

    def __exit__(self, *_: object) -> None:
        for framework in list(self.running):
            self.stop(framework)
        self.compiled.cleanup()

    def ask(self, framework: str, command: str) -> tuple[Any, float]:
        """Calls a method of the framework's `Step`.

        Returns:
            What it returned, and its seconds.

        Raises:
            UserError: If it failed, or its process is gone.
        """
        if framework not in self.running:
            self.start(framework)
        process, connection = self.running[framework]
        try:
            connection.send(command)
            answer = connection.recv()
        except (EOFError, OSError):
            process.join()
            answer = Failure(f"{framework}: its process ended with code {process.exitcode}.", "Is there enough memory?")
        if isinstance(answer, Failure):
            raise UserError(*answer)
        return answer

    def start(self, framework: str) -> None:
        if self.preset.alone:
            for other in list(self.running):
                self.stop(other)
        print(f"{framework}: starts, and compiles one step", file=sys.stderr, flush=True)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, framework, self.preset))
        with self._environment():
            process.start()
        theirs.close()
        self.running[framework] = process, ours

    def stop(self, framework: str) -> None:
        process, connection = self.running.pop(framework)
        with contextlib.suppress(OSError):  # it has ended by itself
            connection.send("")
        process.join()

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        """Variables of the processes, where they are not set: they are read before any line of ours runs."""
        ours = dict(os.environ)
        room = {"XLA_PYTHON_CLIENT_PREALLOCATE": "0"}
        if self.preset.alone:
            room = {"XLA_PYTHON_CLIENT_MEM_FRACTION": gpu.MEMORY_FRACTION, "XLA_FLAGS": gpu.XLA_FLAGS}
        quiet = dict.fromkeys(("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"), "error")
        caches = dict.fromkeys(("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), self.compiled.name)
        os.environ.update(room | quiet | caches | ours)
        yield
        os.environ.clear()
        os.environ.update(ours)
