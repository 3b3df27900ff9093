"""VIEScore as GEdit-Bench asks for it: how well was edited, and how good the picture is (arXiv 2312.14867, 2504.17761).

Its prompts are not in this package: they are read from the file `viescore/vie_prompts.py` of GEdit-Bench's scripts
(repository stepfun-ai/Step1X-Edit, Apache-2.0). Nothing in that file is run.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from rcgrpo_jax.errors import UserError, reason
from rcgrpo_jax.rewards.base import register
from rcgrpo_jax.rewards.editscore import read_score
from rcgrpo_jax.rewards.judge import Count, Question, SampledJudge

FULL = 10  # the best sub-score
NAMES = ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC",
         "_prompts_0shot_rule_PQ")  # fmt: skip
_REMEDY = "Name GEdit-Bench/viescore/vie_prompts.py of the repository stepfun-ai/Step1X-Edit."


def read_prompts(path: str) -> tuple[str, str]:
    """GEdit-Bench's questions about the edit and about the picture's quality, from its file.

    Raises:
        UserError: It cannot be read, or lacks one of the texts.
    """
    if not path:
        raise UserError("prompts: none found; the file with GEdit-Bench's prompts was wanted.", _REMEDY)
    try:
        tree = ast.parse(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"prompts: {path!r} cannot be read ({reason(error)}).", _REMEDY) from None
    said = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if lacking := [name for name in NAMES if name not in said]:
        raise UserError(f"prompts: {path!r} has no text {', '.join(lacking)}.", _REMEDY)
    context, rule, edit, quality = (said[name] for name in NAMES)
    return "\n".join((context, rule, edit)).replace("<instruction>", "{instruction}"), "\n".join((context, quality))


@register("viescore")
@dataclass(frozen=True)
class VIEScore(SampledJudge):
    """Asks for two sub-scores of the edit, SC, and two of the picture alone, PQ; the reward is `sqrt(SC PQ) / 10`.

    SC and PQ are the smaller of their sub-scores, in [0, 10]. Of several passes the mean counts. People know SC, PQ and
    their root as G_SC, G_PQ and G_O.
    """

    prompts: str = ""  # the file; there is no default
    text_first: bool = False  # before the pictures, as GPT-4.1 is asked; else after them, as Qwen2.5-VL is
    max_tokens: Count = 1400

    incidental = (*SampledJudge.incidental, "prompts")  # its content counts
    columns = ("G_SC", "G_PQ", "G_O")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._questions  # noqa: B018 (the file is read before a run starts)

    def questions(self) -> tuple[Question, Question]:
        return self._questions

    @cached_property
    def _questions(self) -> tuple[Question, Question]:
        def asked(pictures: str, text: str) -> Question:
            return Question(text + pictures if self.text_first else pictures + text, partial(read_score, full=FULL))

        edit, quality = read_prompts(self.prompts)
        return asked("{source}{edited}", edit), asked("{edited}", quality)

    def combine(self, scores: Float[np.ndarray, "passes 2"]) -> float:
        return self.details(scores)[2] / FULL

    def details(self, scores: Float[np.ndarray, "passes 2"]) -> Sequence[float]:
        return *scores.mean(0), np.sqrt(scores.prod(1)).mean()
