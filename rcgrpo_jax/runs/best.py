"""The best checkpoint by a score on held-out examples: which it is, its mark, and when a run ends for want of a better.

What is known of it is in `metrics.jsonl` and on disk, so that a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform, parse_json
from rcgrpo_jax.errors import UserError

MARK = "best.json"  # in the directory of the checkpoints


@dataclass
class Best:
    """The scores of a run so far, and the step with the highest.

    Attributes:
        metric: What is compared; higher is better. Empty: nothing is.
        patience: How many scores without a better one end the run; 0: it never ends so.
        scores: Step -> score, in ascending order; NaN where there is none, which is never better.
        step: The best step; None before the first score.
    """

    metric: str
    patience: int
    scores: dict[int, float] = field(default_factory=dict)
    step: int | None = None

    @classmethod
    def read(
        cls, metric: str, patience: int, lines: Sequence[Mapping[str, Any]], last: int, saved: Collection[int]
    ) -> Best:
        """What a run that resumes from step `last` knows.

        Args:
            metric: As above.
            patience: As above.
            lines: Of `metrics.jsonl`; the run will repeat those after `last`.
            last: Step of the latest checkpoint; 0: none.
            saved: The steps that have a checkpoint. Only one of them can be the best.
        """
        found = {line["step"]: line[metric] for line in lines if metric in line and 0 < line["step"] <= last}
        scores = {step: math.nan if score is None else score for step, score in found.items()}
        known = {step: score for step, score in scores.items() if step in saved and math.isfinite(score)}
        return cls(metric, patience, scores, max(known, key=known.__getitem__, default=None))

    def add(self, step: int, score: float) -> bool:
        """Takes the score of a step, and says whether it is the best."""
        self.scores[step] = score
        if not math.isfinite(score) or (self.step is not None and score <= self.scores[self.step]):
            return False
        self.step = step
        return True

    @property
    def waited(self) -> int:
        """How many scores came since the best one."""
        return sum(step > (self.step or 0) for step in self.scores)

    @property
    def ends_run(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self.patience <= self.waited

    def __str__(self) -> str:
        best = f"{self.scores[self.step]:.4g} at step {self.step}" if self.step else "none"
        return f"{self.metric}: the best is {best}, and train.patience is {self.patience}"


@dataclass
class Held:
    """Orbax's preservation policy of one checkpoint."""

    step: int | None = None  # its step; None: of none

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class _Mark(TypedDict):
    __pydantic_config__ = STRICT
    metric: str
    step: Annotated[int, Interval(ge=1)]
    score: float


def write_mark(folder: Path, best: Best) -> None:
    """Writes which of the checkpoints in a folder is the best; without a best one, removes what stood there.

    Raises:
        UserError: It cannot be written.
    """
    file, partial = folder / MARK, folder / f"{MARK}.tmp"
    try:
        if best.step is None:
            file.unlink(missing_ok=True)
            return
        mark = {"metric": best.metric, "step": best.step, "score": best.scores[best.step]}
        partial.write_text(json.dumps(mark) + "\n", encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error}).",
            "Free some space, then run the same command: it resumes from the last checkpoint.",
        ) from None


def best_step(folder: Path) -> int:
    """The step of the best checkpoint in a folder, by its mark.

    Raises:
        UserError: There is no mark, or it is damaged.
    """
    file = folder / MARK
    try:
        mark = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file}: not there, so that no checkpoint is the best.",
            "Name a step, or train with train.samples and train.best.",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}).", "Name a step instead.") from None
    conform(mark, _Mark, str(file), "Name a step instead.")
    return mark["step"]
