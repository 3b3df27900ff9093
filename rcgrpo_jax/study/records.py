"""The two files of a study beside its page: the key, which stays with the researcher, and the votes of each voter.

NAME.key.json   who made which edit: the page has ids alone
votes-*.json    what the page saves: which id was chosen where
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, MinLen
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform, read_object, shorten
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.tables import one_line

UNSURE = "Not sure"  # among the makers: an answer that chooses none
LONGEST_NAME = 60  # characters of a voter's name, as the page has it
_VOTE_BYTES, _MORE_BYTES = 2_000, 100_000  # of a file of votes at most, for each choice and besides: nine ids take 500
_KEY_REMEDY = "Name the .key.json that `rcgrpo study build` wrote beside the page."
_VOTES_REMEDY = "Name a file as the page saved it, or ask the voter to save it again."


class KeyExample(TypedDict):
    """One example of a study."""

    __pydantic_config__ = STRICT
    name: str  # in the data
    edits: dict[str, str]  # id on the page -> who made it, from the first position to the last


class Key(TypedDict):
    """What the page does not tell."""

    __pydantic_config__ = STRICT
    study: str  # id
    seed: int  # of ids, orders and the choice of examples
    makers: Annotated[list[str], MinLen(2)]
    questions: Annotated[dict[str, str], MinLen(1)]  # id -> text
    examples: Annotated[dict[str, KeyExample], MinLen(1)]  # by id


class Answer(TypedDict):
    """One vote."""

    __pydantic_config__ = STRICT
    question: str  # id, as the others
    example: str
    chosen: str | None  # an edit; None: not sure
    seconds: Annotated[float, Ge(0)]  # from the first look to the vote
    shown: list[str]  # the edits, from the first position to the last


class Votes(TypedDict):
    """All votes of one voter."""

    __pydantic_config__ = STRICT
    study: str
    voter: str
    answers: list[Answer]


def write_key(path: Path, key: Key) -> None:
    """Writes the key of a study.

    Raises:
        OSError: It cannot be written, or there is such a file.
    """
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(key, indent=2, ensure_ascii=False) + "\n")


def read_key(path: Path) -> Key:
    """The key of a study.

    Raises:
        UserError: The file is none, or is damaged.
    """
    key = conform(read_object(path, _KEY_REMEDY), Key, str(path), _KEY_REMEDY)
    for name, example in key["examples"].items():
        if sorted(example["edits"].values()) != sorted(key["makers"]):
            raise UserError(
                f"{path}: examples.{name}: edits of {', '.join(example['edits'].values())} found; one of each of "
                f"{', '.join(key['makers'])} was wanted.",
                _KEY_REMEDY,
            )
    for field, names in (("makers", [*key["makers"], UNSURE]), ("questions", [*key["questions"].values()])):
        if len(set(names)) < len(names):
            raise UserError(
                f"{path}: {field}: {shorten(names)} found; different ones were wanted, and none called {UNSURE}.",
                _KEY_REMEDY,
            )
    return key


def read_votes(key: Key, paths: Sequence[Path]) -> list[Votes]:
    """The votes of all voters, a file each.

    Raises:
        UserError: A file holds no votes of this study, two are of one voter, or nobody has voted.
    """
    files: dict[str, Path] = {}
    votes = []
    most = _MORE_BYTES + _VOTE_BYTES * len(key["questions"]) * len(key["examples"])
    for path in paths:
        _check_size(path, most)
        found = conform(read_object(path, _VOTES_REMEDY), Votes, str(path), _VOTES_REMEDY)
        if found["study"] != key["study"]:
            raise UserError(
                f"{path}: votes of the study {shorten(found['study'])} found; {key['study']} of --key was wanted.",
                "Name the key that was written beside the page of these votes, or leave the file out.",
            )
        found["voter"] = _name_of(found, path)
        other = files.setdefault(found["voter"], path)
        if other is not path:
            raise UserError(
                f"{path}: votes of {found['voter']} found, and {other} has votes of that name; one file a voter was "
                "wanted.",
                'Leave the earlier one out; if they are of two people, change "voter" in one.',
            )
        _check_answers(key, found, path)
        votes.append(found)
    if not any(found["answers"] for found in votes):
        raise UserError(f"--votes: no vote found in {len(votes)} files; at least one was wanted.", _VOTES_REMEDY)
    return votes


def _check_size(path: Path, most: int) -> None:
    """Refuses a file that is too large to hold votes of the study, before it is read."""
    with suppress(OSError):  # whoever reads it says so
        if (size := path.stat().st_size) > most:
            raise UserError(f"{path}: {size:,} bytes found; votes of this study take {most:,} at most.", _VOTES_REMEDY)


def _name_of(votes: Votes, path: Path) -> str:
    """The voter's name, as the page trims it: it stands in tables.

    Raises:
        UserError: It is none that fits into a line.
    """
    name = votes["voter"].strip()
    if one_line(name) != name or not 0 < len(name) <= LONGEST_NAME:
        raise UserError(
            f"{path}: voter: {shorten(votes['voter'])} found; a name of 1 to {LONGEST_NAME} characters in one line was "
            "wanted.",
            'Change "voter" in the file.',
        )
    return name


def _check_answers(key: Key, votes: Votes, path: Path) -> None:
    """Refuses answers that the page of the study cannot give."""
    answered = set()
    for number, answer in enumerate(votes["answers"]):
        where = f"{path}: answers.{number}"
        for field, known in (("question", key["questions"]), ("example", key["examples"])):
            if answer[field] not in known:
                raise UserError(
                    f"{where}.{field}: {shorten(answer[field])} found; one of the {len(known)} ids of the key was "
                    "wanted.",
                    _VOTES_REMEDY,
                )
        edits = [*key["examples"][answer["example"]]["edits"]]
        if answer["shown"] != edits:
            raise UserError(
                f"{where}.shown: {shorten(answer['shown'])} found; {', '.join(edits)} of the key was wanted.",
                _VOTES_REMEDY,
            )
        if answer["chosen"] is not None and answer["chosen"] not in edits:
            raise UserError(
                f"{where}.chosen: {shorten(answer['chosen'])} found; one of {', '.join(edits)} or null was wanted.",
                _VOTES_REMEDY,
            )
        if not math.isfinite(answer["seconds"]):
            raise UserError(f"{where}.seconds: {answer['seconds']} found; a number was wanted.", _VOTES_REMEDY)
        place = answer["question"], answer["example"]
        if place in answered:
            raise UserError(
                f"{where}: a second answer to {place[0]} of the example {place[1]} found; one was wanted.",
                _VOTES_REMEDY,
            )
        answered.add(place)
