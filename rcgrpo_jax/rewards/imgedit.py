"""The judge of ImgEdit-Bench's basic suite: three ratings from 1 to 5, by a prompt for each kind of edit.

The prompts are not in this package: the authors' repository names no licence. They are read from the file that comes
with the benchmark, `judge_prompt.json`, which is `prompts.json` in the repository (arXiv 2505.20275).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rcgrpo_jax.borders import conform, read_object, shorten
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards.base import register
from rcgrpo_jax.rewards.judge import Question, SampledJudge, written

LOWEST, HIGHEST, RATINGS = 1, 5, 3
_REMEDY = "Name judge_prompt.json of the benchmark, or Benchmark/Basic/prompts.json of PKU-YuanGroup/ImgEdit."


def read_prompts(path: str) -> dict[str, str]:
    """Kind of edit -> the question about it, from the benchmark's file.

    Raises:
        UserError: It cannot be read, or is no JSON object of texts.
    """
    if not path:
        raise UserError("prompts: none found; the file with ImgEdit-Bench's prompts was wanted.", _REMEDY)
    found = read_object(Path(os.path.expanduser(path)), _REMEDY)
    conform(found, dict[str, str], f"prompts: {path}", _REMEDY)
    return {task: text.replace("<edit_prompt>", "{instruction}") for task, text in found.items()}


def read_ratings(choice: Mapping[str, Any]) -> float:
    """The mean of the ratings in an answer, scaled to [0, 1]. A rating is a line `NAME: NUMBER`.

    Raises:
        ValueError: There are not exactly three, from 1 to 5.
    """
    text = written(choice)
    lines = [line.strip().split(": ") for line in text.splitlines()]
    found = [int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()]
    if len(found) != RATINGS or not all(LOWEST <= x <= HIGHEST for x in found):
        wanted = f"{RATINGS} lines NAME: NUMBER with numbers from {LOWEST} to {HIGHEST} are wanted"
        raise ValueError(f"{wanted}: {shorten(text[-60:], 80)}")
    return (float(np.mean(found)) - LOWEST) / (HIGHEST - LOWEST)


@register("imgedit")
@dataclass(frozen=True)
class ImgEditJudge(SampledJudge):
    """Rewards with the mean of three ratings, scaled to [0, 1]; people know that mean itself, from 1 to 5."""

    prompts: str = ""  # the file; there is no default

    needs_task = True
    incidental = (*SampledJudge.incidental, "prompts")  # its content counts
    columns = ("ImgEdit",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._questions  # noqa: B018 (the file is read before a run starts)

    def questions(self) -> tuple[Question, ...]:
        return tuple(self._questions.values())

    def questions_of(self, task: str) -> tuple[Question]:
        if task not in self._questions:
            raise UserError(
                f"prompts: none of the kind of edit {task!r} found; there are those of {', '.join(self._questions)}.",
                "Leave such examples out, or add a prompt.",
            )
        return (self._questions[task],)

    @cached_property
    def _questions(self) -> dict[str, Question]:
        prompts = read_prompts(self.prompts)
        return {task: Question(text + "{source}{edited}", read_ratings) for task, text in prompts.items()}

    def details(self, scores: Float[np.ndarray, "passes 1"]) -> Sequence[float]:
        return (LOWEST + (HIGHEST - LOWEST) * scores.mean(),)
