"""What a run reports while it trains: `metrics.jsonl`, which every run has, and what `train.writers` names."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NotRequired, Self

import jax
import numpy as np
from annotated_types import Interval
from jaxtyping import UInt8
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform, parse_json
from rcgrpo_jax.errors import UserError, mark_everywhere
from rcgrpo_jax.runs.writers import WRITERS, Writer, check_installed

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends the scalars of each step to `<workdir>/metrics.jsonl`, and passes them on to other writers.

    Steps after `resume_step`, which a killed run wrote and the resumed one will repeat, are written once, so that a
    curve has one value a step. In a multi-process run only process 0 writes.

    Args:
        workdir: Directory of the run.
        resume_step: Step of the checkpoint that the run resumes from; 0 for a new run.
        names: The other writers, of `writers.WRITERS`.
        config: The configuration of the run, for those that show it.

    Raises:
        UserError: A writer cannot be opened.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int,
        names: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] = MappingProxyType({}),
    ):
        self._writers: list[Writer] = []
        if jax.process_index() != 0:
            return
        path = Path(workdir) / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        check_installed(names)
        with ExitStack() as opened:
            for kind, place in ((JsonLines, path), *((WRITERS[name], path.parent / name) for name in names)):
                self._writers.append(kind(place, resume_step, config))
                opened.callback(self._writers[-1].close)
            self._opened = opened.pop_all()

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one step, in `metrics.jsonl` on disk when this returns.

        Args:
            step: Training steps done.
            metrics: Name -> scalar (a number or a 0-dimensional array).
        """
        values = {name: float(value) for name, value in metrics.items()} if self._writers else {}
        for writer in self._writers:
            writer.scalars(step, values)

    def images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]) -> None:
        """Sends images, uint8 `[height, width, 3]`, to the writers that show them."""
        for writer in self._writers:
            writer.images(step, images)

    def close(self) -> None:
        if self._writers:
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLines(Writer):
    """Writes a JSON object a step to a file; a value that is not finite becomes `null`. Images have no place there."""

    def __init__(self, file: Path, resume_step: int, config: Mapping[str, Any]):
        try:
            _rewind(file, resume_step)
            self._lines = file.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(file, error) from None

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        line = {"step": step, "time": time.time(), **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        try:
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
            self._lines.flush()
        except OSError as error:
            raise _unwritable(self._lines.name, error) from None

    def images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]) -> None:
        pass

    def close(self) -> None:
        self._lines.close()


class _Line(TypedDict):
    """What a line of `metrics.jsonl` says beside its metrics."""

    __pydantic_config__ = STRICT
    step: Annotated[int, Interval(ge=0)]
    time: NotRequired[Annotated[float, Interval(ge=0, le=253_402_300_799)]]  # seconds; the last of the year 9999


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The steps of a `metrics.jsonl`, in file order, without a last line that a kill tore off.

    Raises:
        UserError: The file cannot be read, another line is not a JSON object with a step, or a value is no number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).", "Correct the path.") from None
    steps = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line)
            steps[f"line {number}"] = {**entry, "step": entry["step"]}
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: not a JSON object with a step: {line[:60]!r}.",
                "Delete that line; the file holds one object a line.",
            ) from error
    remedy = "Correct or delete that line."
    conform(steps, dict[str, dict[str, float | None]], str(path), remedy)
    conform(steps, dict[str, _Line], str(path), remedy)
    return [*steps.values()]


def _rewind(path: Path, last_step: int) -> None:
    """Drops the steps after `last_step` (all if it is 0) and a torn last line; the file is replaced whole, or not."""
    if not path.exists():
        return
    partial = path.with_suffix(".jsonl.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            kept = [entry for entry in read_metrics(path) if last_step and entry["step"] <= last_step]
            file.writelines(json.dumps(entry) + "\n" for entry in kept)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _unwritable(path: str | os.PathLike[str], error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error}).",
        "Free some space, then run the same command: it resumes from the last checkpoint.",
    )


def check_finite(metrics: Mapping[str, Any], step: int) -> None:
    """Stops a run whose loss or gradient norm (`loss`, `grad_norm`, under any prefix such as `train/`) is lost.

    Raises:
        UserError: Names the metric, its value and the step.
    """
    for name, value in metrics.items():
        if name.rsplit("/", 1)[-1] in ("loss", "grad_norm") and not math.isfinite(value):
            lost = UserError(
                f"Step {step}: {name} is {float(value)}; it must be finite.",
                "Start a new --workdir with a lower optimizer.learning_rate; the checkpoints of this one stay, and "
                "JAX_DEBUG_NANS=True finds the operation.",
            )
            raise mark_everywhere(lost)  # metrics are those of all processes
