"""The file of rollouts: what all of them depend on in `settings.json`, and a line each in `rollouts.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform, parse_json, read_object, shorten
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.result import LATER
from rcgrpo_jax.runs.workdir import write_text

SETTINGS, ROLLOUTS = "settings.json", "rollouts.jsonl"
PARTS = ("all", "early", "late")  # steps that a mean is over: all, the noisier half, the cleaner half
_ANOTHER = "Use another folder, or put the values back."


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What was found of N examples in S noises."""

    names: tuple[str, ...]  # of the examples
    seeds: tuple[int, ...]  # of the noises
    scores: Float[np.ndarray, "N S"]  # float64; NaN: none
    densities: Float[np.ndarray, "N S 3 L"]  # ACD (Eq. 17) of each block, means over the steps of `PARTS`; NaN as found
    causes: tuple[str, ...] = ()  # why scores are missing, where a reward says so


class _Line(TypedDict):
    """A rollout in the file."""

    __pydantic_config__ = STRICT
    name: str  # of the example
    index: int  # in the source
    seed: int
    example: str  # digest of its pictures and its instruction
    score: float | None
    cause: str  # why there is no score
    acd: dict[str, list[float | None]]  # by part of the steps, a number a block


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Says in a folder what its rollouts depend on, or refuses one of others."""
    file, wanted = folder / SETTINGS, json.loads(json.dumps(settings))  # tuples as the file has them
    if not file.exists():
        if (folder / ROLLOUTS).exists():
            raise UserError(f"{folder}: {ROLLOUTS} without {SETTINGS} found.", "Choose another folder.")
        write_text(file, json.dumps(wanted, indent=2) + "\n")
    there = LATER | read_object(file, _ANOTHER)
    differing = [
        f"{field}: there {shorten(there.get(field), 20)}, now {shorten(wanted.get(field), 20)}"
        for field in {**there, **wanted}
        if there.get(field) != wanted.get(field)
    ]
    if differing:
        raise UserError(f"{folder}: rollouts made otherwise found: {'; '.join(differing)}.", _ANOTHER)


class RolloutLog:
    """The rollouts of a file: those that are there with a score, and lines that are added.

    Args:
        path: The file.
        blocks: Of the model.
    """

    def __init__(self, path: Path, blocks: int):
        self._path, self._blocks = path, blocks
        self.lines: dict[tuple[int, int], dict[str, Any]] = {}  # by index and seed

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("a+b")
            self._file.seek(0)
            text = self._file.read()
            self._file.truncate(text.rfind(b"\n") + 1)  # without what a kill tore off
        except OSError as error:
            raise self._unwritable(error) from None
        for number, line in enumerate(text.split(b"\n")[:-1], start=1):
            where, remedy = f"{self._path}, line {number}", "Delete that line: the rollout is made again."
            try:
                found = conform(parse_json(line), _Line, where, remedy)
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}).", remedy) from None
            lengths = {part: len(found["acd"].get(part, ())) for part in PARTS}
            if set(lengths.values()) != {self._blocks} or len(found["acd"]) != len(PARTS):
                raise UserError(f"{where}: acd of {lengths} blocks found; {self._blocks} were wanted.", remedy)
            if found["score"] is not None:  # else it is made again: a judge may answer now
                self.lines[found["index"], found["seed"]] = found
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self, names: Sequence[str], digests: Sequence[str]) -> None:
        """Refuses rollouts of other examples."""
        for (index, _), line in self.lines.items():
            if index < len(names) and (line["name"], line["example"]) != (names[index], digests[index]):
                raise UserError(
                    f"{self._path}: a rollout of another example {index}, {line['name']}, found.",
                    "Use another folder, or put the data back.",
                )

    def add(
        self, name: str, index: int, seed: int, example: str, score: float, cause: str,
        densities: Float[np.ndarray, "3 L"],
    ) -> None:  # fmt: skip
        """Adds a rollout, on disk when this returns."""
        acd = {part: [_number(x) for x in row] for part, row in zip(PARTS, densities, strict=True)}
        line = _Line(
            name=name, index=index, seed=seed, example=example, score=_number(score), cause=cause, acd=acd
        )  # fmt: skip
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        self.lines[index, seed] = line

    def rollouts(self, names: tuple[str, ...], seeds: tuple[int, ...]) -> Rollouts:
        """Those of the first examples and of some seeds, all of them there."""
        table = [[self.lines[index, seed] for seed in seeds] for index in range(len(names))]
        scores = np.array([[line["score"] for line in row] for row in table], float)  # None becomes NaN
        densities = np.array([[[line["acd"][part] for part in PARTS] for line in row] for row in table], float)
        causes = dict.fromkeys(line["cause"] for row in table for line in row if line["cause"])
        return Rollouts(names, seeds, scores, densities, tuple(causes))

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"--out: {self._path} cannot be written ({error}).", "Choose a folder you can write to.")


def _number(x: np.floating) -> float | None:
    """A float32 in its fewest digits; None if it is not finite."""
    return float(str(np.float32(x))) if math.isfinite(x) else None
