"""A rating by your own prompt: a file with place-holders, and a field of the JSON object that is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rcgrpo_jax.borders import is_like, shorten
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards.base import register
from rcgrpo_jax.rewards.judge import Question, SampledJudge, written


def read_template(path: str) -> str:
    """The text of a file with the place-holder `{edited}`, and as it likes `{source}` and `{instruction}`.

    Raises:
        UserError: It cannot be read, or does not show the edited picture.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"template: {path!r} cannot be read ({cause}).", "Name a text file with the prompt.") from None
    if "{edited}" not in text:
        raise UserError(
            f"template: {path!r} has no {{edited}}, where the edited picture is shown.",
            "Write {edited} into it, and {source} and {instruction} where you want them.",
        )
    return text


def read_field(choice: Mapping[str, Any], field: str, lowest: float, highest: float) -> float:
    """A number in an answer, scaled to [0, 1]: `(x - lowest) / (highest - lowest)`.

    Raises:
        ValueError: The last JSON object with the field has no number in [lowest, highest] there, or none has the field.
    """
    text = written(choice)
    found = [value[field] for value in _objects(text) if field in value]
    if not found or not is_like(found[-1], 0.0) or not lowest <= found[-1] <= highest:
        wanted = f"a JSON object with {field!r}, a number from {lowest:g} to {highest:g}, is wanted"
        raise ValueError(f"{wanted}: {shorten(text[-60:], 80)}")
    return (found[-1] - lowest) / (highest - lowest)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The whole JSON objects in a text, but for those within another."""
    start = 0
    while (start := text.find("{", start)) >= 0:
        try:
            value, start = json.JSONDecoder().raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):
            start += 1


@register("rubric")
@dataclass(frozen=True)
class Rubric(SampledJudge):
    """Rewards with the number that the judge answers to your prompt, scaled to [0, 1]."""

    template: str = ""  # the file; there is no default
    field: str = "score"  # of the JSON object in the answer
    lowest: float = 0.0  # the worst number
    highest: float = 10.0  # the best

    incidental = (*SampledJudge.incidental, "template")  # its content counts

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.template:
            raise UserError(
                "template: none found; a text file with a prompt was wanted.",
                "Write one with {edited} in it, and set `template` to its path.",
            )
        if self.lowest >= self.highest:
            raise UserError(
                f"highest: {self.highest:g} found with lowest: {self.lowest:g}; a larger number was wanted.",
                "Correct them in reward_options of the configuration.",
            )
        self._template  # noqa: B018 (read before a run starts)

    def questions(self) -> tuple[Question]:
        read = partial(read_field, field=self.field, lowest=self.lowest, highest=self.highest)
        return (Question(self._template, read),)

    @cached_property
    def _template(self) -> str:
        return read_template(self.template)
