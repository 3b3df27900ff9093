"""EditScore: a vision-language model rates the edit and the picture (arXiv 2509.23909)."""

from __future__ import annotations

import math
import re
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from rcgrpo_jax.borders import shorten
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards.base import register
from rcgrpo_jax.rewards.judge import NotNegative, Probability, Question, SampledJudge, Temperature, written

FULL = 25  # the best sub-score
_SCORE = re.compile(r"""\bscore["']?\s*:\s*\[([^\[\]]*)\]""")


def read_prompts() -> tuple[str, str]:
    """EditScore's questions about the edit and about the picture's quality, from its package.

    The package itself is not imported: that would need torch.

    Raises:
        UserError: It is not installed.
    """
    spec = find_spec("editscore")
    files = [Path(folder, "vie_prompts.py") for folder in (spec and spec.submodule_search_locations) or ()]
    if not files or not files[0].is_file():
        raise UserError(
            "no package `editscore` found, whose prompts are asked; version 0.2 was wanted.",
            "Run: pip install --no-deps editscore==0.2",
        )
    said = runpy.run_path(str(files[0]))
    context, rule = said["_context_no_delimit_reasoning_first"], said["_prompts_0shot_two_image_edit_rule"]
    edit, quality = said["_prompts_0shot_tie_rule_SC"], said["_prompts_0shot_rule_PQ"]
    edit, quality = (text.replace("10", str(FULL)) for text in (edit, quality))
    return "\n".join((context, rule, edit)).replace("<instruction>", "{instruction}"), "\n".join((context, quality))


def read_score(choice: Mapping[str, Any], full: float = FULL) -> float:
    """The smaller of the two sub-scores of an answer, in [0, 10].

    The last whole list after `score` counts; quotes within the reasoning, or a fence around it, do no harm.

    Raises:
        ValueError: There are not exactly two numbers in [0, full].
    """
    text = written(choice)
    lists = _SCORE.findall(text)
    numbers = [float(number.strip(" \t\r\n\"'")) for number in lists[-1].split(",")] if lists else []
    if len(numbers) != 2 or not all(0 <= number <= full for number in numbers):
        raise ValueError(f"a score of two numbers from 0 to {full} is wanted: {shorten(text[-60:], 80)}")
    return min(numbers) / full * 10


@register("editscore")
@dataclass(frozen=True)
class EditScore(SampledJudge):
    """Asks for two sub-scores of the edit, SC, and two of the quality, PQ; the reward is `sqrt(SC PQ) / 10`.

    SC and PQ are the smaller of their sub-scores on a scale of 10. Of several passes the mean counts. The defaults are
    those of EditScore's training of editors (`batch_evaluate` of its package).
    """

    temperature: Temperature = 0.7
    top_p: Probability = 0.9
    top_k: NotNegative = 20
    quality_of: Literal["both", "edited"] = "both"  # pictures that the question of quality shows
    labels: bool = False  # "<img1>: " before each picture, as the judges on Qwen2.5-VL have learned it
    average_first: bool = False  # SC and PQ over the passes first, and then the root

    def __post_init__(self) -> None:
        super().__post_init__()
        self._questions  # noqa: B018 (the package is looked for before a run starts)

    def questions(self) -> tuple[Question, Question]:
        return self._questions

    @cached_property
    def _questions(self) -> tuple[Question, Question]:
        edit, quality = read_prompts()
        one, two = ("<img1>: ", "<img2>: ") if self.labels else ("", "")
        both, alone = one + "{source}" + two + "{edited}", one + "{edited}"
        seen = both if self.quality_of == "both" else alone
        return Question(both + edit, read_score), Question(seen + quality, read_score)

    def combine(self, scores: Float[np.ndarray, "passes 2"]) -> float:
        if self.average_first:
            return math.sqrt(scores.mean(0).prod()) / 10
        return float(np.sqrt(scores.prod(1)).mean()) / 10
