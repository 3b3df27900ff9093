"""How far a long job is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, TextIO

from tqdm import tqdm


class ProgressCallback(Protocol):
    """Is told of each step of long jobs: how functions below the command line say how far they are."""

    def __call__(self, job: str, done: int, total: int) -> None: ...


def no_progress(job: str, done: int, total: int) -> None:
    """Tells nobody."""


def count_steps(progress: ProgressCallback, job: str, total: int) -> Callable[[], None]:
    """What is called after each step of one job, counts the calls, and tells of them."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(job, done, total)

    return step


class Jobs:
    """Shows each job that it is told of (`ProgressCallback`) by a `Progress` of its own.

    Args:
        lines: Lines that a whole job may print where there is no terminal; None: one a step.
    """

    def __init__(self, lines: int | None = None):
        self._lines = lines
        self._shown: dict[str, Progress] = {}

    def __call__(self, job: str, done: int, total: int) -> None:
        if job not in self._shown:
            self._shown[job] = Progress(total, done - 1, job, lines=self._lines)
        self._shown[job].update()
        if done == total:
            self._shown.pop(job).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for progress in self._shown.values():
            progress.close()


class Progress:
    """A tqdm bar on a terminal; elsewhere one flushed line a step: `train: step 12/100  reward 0.41  3.2 samples/s`.

    Args:
        total: Steps of the whole job.
        initial: Steps done before this process.
        description: What the job is.
        lines: Lines that the whole job may print where there is no terminal; None: one a step.
        file: Where to; standard error by default.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        description: str = "",
        *,
        lines: int | None = None,
        file: TextIO | None = None,
    ):
        self._every = max(1, total // lines) if lines else 1
        self._file = sys.stderr if file is None else file
        self._total, self._step, self._description = total, initial, description
        self._last = time.monotonic()
        terminal = self._file.isatty()
        self._bar = tqdm(total=total, initial=initial, desc=description, file=self._file) if terminal else None

    def update(self, metrics: Mapping[str, Any] | None = None, *, samples: int = 0) -> None:
        """Counts one step.

        Args:
            metrics: Name -> scalar to show.
            samples: Samples that the step processed, for the rate; 0 shows none.
        """
        self._step += 1
        now = time.monotonic()
        shown = {name: f"{float(value):.4g}" for name, value in (metrics or {}).items()}
        rate = f"{samples / max(now - self._last, 1e-9):.1f} samples/s" if samples else ""
        self._last = now
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([*(f"{k}={v}" for k, v in shown.items()), rate]).rstrip(", "))
            self._bar.update()
        elif self._step % self._every == 0 or self._step == self._total:
            label = f"{self._description}: " if self._description else ""
            words = [f"{label}step {self._step}/{self._total}", *(f"{k} {v}" for k, v in shown.items()), rate]
            print("  ".join(filter(None, words)), file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
