"""What the votes of a study say: preference rates of each maker (Fig. 4), by voter and pooled, and wins in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from rcgrpo_jax.evaluation.statistics import Interval, share_interval
from rcgrpo_jax.evaluation.tables import Table
from rcgrpo_jax.study.rates import pooled_rate
from rcgrpo_jax.study.records import UNSURE, Key, Votes


class Rate(NamedTuple):
    """A share of votes with its 95 % interval."""

    count: int
    votes: int  # that it is a share of
    interval: Interval


@dataclass(frozen=True)
class VoterScores:
    """What one voter said."""

    given: int  # votes
    wanted: int  # questions on all examples
    seconds: float  # a vote, median; NaN without votes
    rates: dict[str, dict[str, Rate]]  # question -> maker or `UNSURE` -> share of this voter's votes, Wilson's interval


@dataclass(frozen=True)
class Scores:
    """What all votes say; questions are texts, makers names."""

    study: str
    examples: int
    makers: tuple[str, ...]
    rates: dict[str, dict[str, Rate]]  # question -> maker or `UNSURE` -> share of all votes
    wins: dict[str, dict[tuple[str, str], Rate]]  # question -> (one, other) -> share of one in the votes for either
    positions: dict[str, dict[str, Rate]]  # question -> place on the page -> share of the votes for an edit
    voters: dict[str, VoterScores]

    @property
    def given(self) -> int:
        return sum(voter.given for voter in self.voters.values())

    @property
    def wanted(self) -> int:
        return sum(voter.wanted for voter in self.voters.values())


class _Ballots(NamedTuple):
    """The votes on one question in columns; -1: not sure."""

    maker: Int[np.ndarray, " V"]
    position: Int[np.ndarray, " V"]
    voter: Int[np.ndarray, " V"]
    example: Int[np.ndarray, " V"]


def score(key: Key, votes: Sequence[Votes]) -> Scores:
    """Counts votes.

    Args:
        key: Of the study.
        votes: One of each voter, as `records.read_votes` has them.

    Returns:
        Rates with intervals: pooled ones by `rates.pooled_rate`, those of a voter by `statistics.share_interval`.
    """
    makers = tuple(key["makers"])
    rates, wins, positions = {}, {}, {}
    by_voter: dict[str, dict[str, dict[str, Rate]]] = {found["voter"]: {} for found in votes}
    for question, text in key["questions"].items():
        ballots = _ballots(key, votes, question)
        rates[text] = {name: _pooled(ballots, ballots.maker == i) for i, name in [*enumerate(makers), (-1, UNSURE)]}
        positions[text] = {
            f"Edit {i + 1}": _pooled(_those(ballots, ballots.maker >= 0), ballots.position[ballots.maker >= 0] == i)
            for i in range(len(makers))
        }
        wins[text] = {}
        for (i, one), (j, other) in combinations(enumerate(makers), 2):
            either = _those(ballots, (ballots.maker == i) | (ballots.maker == j))
            wins[text][one, other] = _pooled(either, either.maker == i)
        for v, found in enumerate(votes):
            own = _those(ballots, ballots.voter == v).maker
            by_voter[found["voter"]][text] = {
                name: Rate(int(np.sum(own == i)), len(own), share_interval((own == i).astype(float)))
                for i, name in [*enumerate(makers), (-1, UNSURE)]
            }
    wanted = len(key["questions"]) * len(key["examples"])
    voters = {
        found["voter"]: VoterScores(
            len(found["answers"]), wanted, _median([x["seconds"] for x in found["answers"]]), by_voter[found["voter"]]
        )
        for found in votes
    }
    return Scores(key["study"], len(key["examples"]), makers, rates, wins, positions, voters)


def _ballots(key: Key, votes: Sequence[Votes], question: str) -> _Ballots:
    """The votes on a question."""
    numbers = {example: n for n, example in enumerate(key["examples"])}
    rows = []
    for voter, found in enumerate(votes):
        for answer in found["answers"]:
            if answer["question"] == question:
                maker = position = -1
                if (chosen := answer["chosen"]) is not None:
                    maker = key["makers"].index(key["examples"][answer["example"]]["edits"][chosen])
                    position = answer["shown"].index(chosen)
                rows.append((maker, position, voter, numbers[answer["example"]]))
    return _Ballots(*np.array(rows, np.int64).reshape(-1, 4).T)


def _those(ballots: _Ballots, kept: np.ndarray) -> _Ballots:
    return _Ballots(*(column[kept] for column in ballots))


def _pooled(ballots: _Ballots, chosen: np.ndarray) -> Rate:
    return Rate(int(chosen.sum()), len(chosen), pooled_rate(chosen, ballots.voter, ballots.example))


def _median(seconds: list[float]) -> float:
    return float(np.median(seconds)) if seconds else float("nan")


def tables(scores: Scores) -> list[Table]:
    """The scores as tables: pooled, in pairs, by voter, by place on the page."""
    questions, names = [*scores.rates], [*scores.makers, UNSURE]
    found = [
        Table(
            f"Preference rates, % of votes [95 % interval] (votes): {len(scores.voters)} voters, "
            f"{scores.examples} examples",
            [["edits of", *questions], *([name, *(_cell(scores.rates[q][name]) for q in questions)] for name in names)],
        ),
        Table(
            "Wins, % of the votes for either [95 % interval] (votes for either); * excludes 50 %",
            [
                ["edits of", *questions],
                *(
                    [f"{one} over {other}", *(_win_cell(scores.wins[q][one, other]) for q in questions)]
                    for one, other in combinations(scores.makers, 2)
                ),
            ],
        ),
    ]
    found += [
        Table(
            f"By voter: {question}",
            [
                ["voter", *names, "votes", "seconds a vote"],
                *(
                    [
                        voter,
                        *(_cell(x.rates[question][name], counted=False) for name in names),
                        f"{x.rates[question][UNSURE].votes} of {scores.examples}",
                        "" if np.isnan(x.seconds) else f"{x.seconds:.1f}",
                    ]
                    for voter, x in scores.voters.items()
                ),
            ],
        )
        for question in questions
    ]
    places = [*scores.positions[questions[0]]]
    lines = [[place, *(_cell(scores.positions[q][place]) for q in questions)] for place in places]
    title = "By place on the page, % of the votes for an edit [95 % interval] (votes); the makers had all places alike"
    return [*found, Table(title, [["place", *questions], *lines])]


def notes(scores: Scores) -> list[str]:
    """What a reader of the tables must know, a line each."""
    lines = [f"{scores.given} of {scores.wanted} votes were given."]
    if partly := [f"{name} {x.given} of {x.wanted}" for name, x in scores.voters.items() if x.given < x.wanted]:
        lines.append(f"Not all: {', '.join(partly)}. What was given is counted.")
    if len(scores.voters) == 1:
        lines.append("One voter: the intervals are over examples, and say nothing of other voters.")
    elif len(scores.voters) < 5:
        lines.append(f"{len(scores.voters)} voters tell little of others: their intervals are wide for that.")
    return [*lines, "Stars are not corrected for the number of cells."]


def as_json(scores: Scores) -> dict[str, Any]:
    """The numbers for other programs, null for what is not known."""

    def number(x: float) -> float | None:
        return float(x) if np.isfinite(x) else None

    def numbers(rate: Rate) -> dict[str, Any]:
        bounds = {"rate": rate.interval.mean, "low": rate.interval.low, "high": rate.interval.high}
        return {"count": rate.count, "votes": rate.votes, **{name: number(x) for name, x in bounds.items()}}

    def listed(rates: dict[str, dict[str, Rate]], field: str) -> list[dict[str, Any]]:
        return [{"question": q, field: name, **numbers(x)} for q, row in rates.items() for name, x in row.items()]

    return {
        "scored_study": scores.study,  # the key's file begins with "study", and must not be taken for this one
        "examples": scores.examples,
        "given": scores.given,
        "wanted": scores.wanted,
        "rates": listed(scores.rates, "edits"),
        "wins": [
            {"question": q, "one": one, "other": other, **numbers(x)}
            for q, row in scores.wins.items()
            for (one, other), x in row.items()
        ],
        "positions": listed(scores.positions, "position"),
        "voters": [
            {"voter": name, "given": x.given, "wanted": x.wanted, "seconds": number(x.seconds),
             "rates": listed(x.rates, "edits")}
            for name, x in scores.voters.items()
        ],
    }  # fmt: skip


def _cell(rate: Rate, counted: bool = True) -> str:
    if not rate.votes:
        return "no votes"
    mean, low, high = (100 * x for x in rate.interval)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" + (f" ({rate.count})" if counted else "")


def _win_cell(rate: Rate) -> str:
    if not rate.votes:
        return "no votes"
    star = " *" * (rate.interval.low > 0.5 or rate.interval.high < 0.5)
    mean, low, high = (100 * x for x in rate.interval)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}] ({rate.votes}){star}"
