"""A rating by the probabilities of an answer's digit, as Edit-R1 and CoCoEdit ask Qwen2.5-VL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from annotated_types import Len
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT
from rcgrpo_jax.rewards.base import register
from rcgrpo_jax.rewards.judge import Judge, Question, matching
from rcgrpo_jax.rewards.rubric import read_template

HIGHEST = 5  # the best digit
_PROMPT = (  # ours
    "{source}{edited}The second picture is an edit of the first. The instruction was: {instruction}\n"
    "How well does the edit follow the instruction and keep everything else as it was? Answer with one digit, from 0 "
    "(not at all) to 5 (perfectly), and nothing else."
)


class _Token(TypedDict):
    token: str
    logprob: float


class _Place(TypedDict):
    top_logprobs: list[_Token]


class _Places(TypedDict):
    content: Annotated[list[_Place], Len(1)]


class _Rated(TypedDict):
    __pydantic_config__ = STRICT
    logprobs: _Places


def expected_digit(choice: Mapping[str, Any]) -> float:
    """`sum_d d p(d) / sum_d p(d) / 5` over the digits d of 0 to 5 among the likeliest first tokens; in [0, 1].

    Raises:
        ValueError: No digit is among them, or the server sends no log-probabilities.
    """
    if not choice.get("logprobs"):
        raise ValueError("the server sends no log-probabilities")
    tokens = matching(choice, _Rated)["logprobs"]["content"][0]["top_logprobs"]
    digits = {str(digit): digit for digit in range(HIGHEST + 1)}
    rated = [(digits[x["token"]], math.exp(min(x["logprob"], 0))) for x in tokens if x["token"] in digits]
    total = sum(probability for _, probability in rated)
    if not total:
        raise ValueError(f"no digit from 0 to {HIGHEST} is among the likeliest tokens")
    return sum(digit * probability for digit, probability in rated) / total / HIGHEST


@register("vlm_digits")
@dataclass(frozen=True)
class VLMDigits(Judge):
    """Rewards with the expected digit of the answer; one token is computed for each candidate."""

    template: str = ""  # a file with a prompt, as of `rubric`; empty: one of ours

    incidental = (*Judge.incidental, "template")  # its content counts

    def __post_init__(self) -> None:
        super().__post_init__()
        self._template  # noqa: B018 (read before a run starts)

    def request(self) -> dict[str, Any]:
        return {"temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}

    def questions(self) -> tuple[Question]:
        return (Question(self._template, expected_digit),)

    @cached_property
    def _template(self) -> str:
        return read_template(self.template) if self.template else _PROMPT
