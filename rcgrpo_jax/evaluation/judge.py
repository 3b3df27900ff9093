"""Whether a reward can tell good edits from bad, before anything is trained on it: pictures that are there, scored."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax.data.example import EditExample, Needs, Source, check_needs
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.examples import EditedBatch, ExampleBatch, read_batches
from rcgrpo_jax.evaluation.pictures import read_picture
from rcgrpo_jax.evaluation.statistics import Interval, mean_interval, share_interval
from rcgrpo_jax.rewards import Reward, RewardInputs, Unscored, start_all
from rcgrpo_jax.rewards.base import named
from rcgrpo_jax.rewards.judge import Judge

logger = logging.getLogger(__name__)
APART = 1000  # between the seeds of two repeats: more than the askings of a question, each of which has the next seed
TARGETS, SOURCES = "targets", "sources"

Table = Float[np.ndarray, "N R"]  # scores of N examples in R repeats; NaN: none
Pictures = Callable[[ExampleBatch], UInt8[np.ndarray, "P H W 3"]]  # what is scored of the examples


@dataclass(frozen=True)
class Judged:
    """Scores of pictures by one reward, repeated."""

    scores: Mapping[str, Table]  # by what was scored: a folder's name, targets, sources
    seconds: float  # a score, where all of a batch are asked for at once
    cause: str = ""  # why a call gave no scores at all, the first such


class Summary(NamedTuple):
    """What the scores of one kind of pictures say, in units of the reward; NaN where there are too few."""

    mean: Interval
    repeats: float  # standard deviation between repeats of an example
    examples: float  # standard deviation between examples, without what repeats add to it
    unscored: float  # share of the scores that are missing

    @property
    def noise(self) -> float:
        """The first spread over the second: 0 for a judge that repeats itself, above 1 where noise is the larger."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.divide(self.repeats, self.examples))


def folder_pictures(folder: Path) -> Pictures:
    """Reads the edits of a folder, NAME.png for each example."""

    def read(batch: ExampleBatch) -> UInt8[np.ndarray, "P H W 3"]:
        return np.stack([read_picture(folder, x.name, x.image.shape[:2]) for x in batch.examples])

    return read


def target_pictures(batch: ExampleBatch) -> UInt8[np.ndarray, "P H W 3"]:
    """The right results."""
    for example in batch.own:
        check_needs(example, Needs(right_target="--targets"))
    return np.stack([example.target for example in batch.examples])


def source_pictures(batch: ExampleBatch) -> UInt8[np.ndarray, "P H W 3"]:
    """The pictures that were to be edited, as the edit that does nothing."""
    return batch.pixels


def judge(
    rewards: Sequence[Reward],
    source: Source,
    indices: Sequence[int],
    pictures: Mapping[str, Pictures],
    size: tuple[int, int],
    *,
    batch: int = 32,
    progress: Callable[[], None] = lambda: None,
) -> Judged:
    """Scores pictures of examples with a reward, once a repeat.

    Args:
        rewards: The reward of each repeat: one reward, with another seed where it has one.
        source: The examples.
        indices: Which of them; one at least.
        pictures: What to score of them, by name. They are candidates of one group for the reward.
        size: (height, width) that the examples are brought to.
        batch: Examples whose scores are asked for at once.
        progress: Called for each example, after its batch.

    Raises:
        UserError: An example or a picture cannot be read or scored, the reward fails, or nothing has a score.
    """
    parts, seconds, cause = [], 0.0, ""
    for examples in read_batches(source, indices, min(batch, len(indices)), size):
        inputs = _inputs(examples, pictures, rewards[0])
        begin = time.perf_counter()
        scores, failures = start_all({str(r): reward for r, reward in enumerate(rewards)}, inputs).result()
        seconds += time.perf_counter() - begin
        cause = cause or next(iter(failures.values()), "")
        parts.append(np.stack([*scores.values()], axis=-1))  # [P, G, R]
        for _ in examples.own:
            progress()
    found = np.concatenate(parts)
    if not np.isfinite(found).any():
        raise UserError(
            f"none of {found.size} scores came{f': {cause}' if cause else '.'}",
            "See what the reward wants and answers.",
        )
    tables = {name: found[:, g].astype(np.float64) for g, name in enumerate(pictures)}
    return Judged(tables, seconds / found.size, cause)


def scores_of(name: str, reward: Reward, edited: EditedBatch) -> dict[str, Float[np.ndarray, " n"]]:
    """The reward's score of each edit of a batch, under its name, or the numbers that a judge shows in its place.

    NaN where none came. Rows that repeat have none.
    """
    inputs = _inputs(edited.batch, {name: lambda batch: edited.pictures}, reward)
    if isinstance(reward, Judge) and reward.columns:
        found = np.full((edited.batch.count, len(reward.columns)), np.nan, np.float32)
        try:
            with named(name):
                found = reward.start_details(inputs).result()[:, 0]
        except Unscored as cause:
            logger.warning("%s: no scores of %d edits: %s", name, edited.batch.count, cause)
        return dict(zip(reward.columns, found.T, strict=True))
    found = start_all({name: reward}, inputs).result()
    for cause in found.failures.values():
        logger.warning("%s: no scores of %d edits: %s", name, edited.batch.count, cause)
    return {name: found.by_reward[name][:, 0]}


def _inputs(batch: ExampleBatch, pictures: Mapping[str, Pictures], reward: Reward) -> RewardInputs:
    """The examples with their pictures as candidates."""
    check_scorable(batch.own, reward)
    return reward_inputs(batch, np.stack([read(batch) for read in pictures.values()], axis=1), reward)


def check_scorable(examples: Iterable[EditExample], reward: Reward) -> None:
    """Refuses examples of which a reward cannot score an edit.

    Raises:
        UserError: With the example and what it lacks.
    """
    for example in examples:
        reward.validate(example.instruction)
        check_needs(example, Needs(right_target="the reward" * reward.needs_target))
        check_needs(example, Needs(caption="the reward" * reward.needs_caption))
        if reward.needs_task and not example.task:
            raise UserError(f"{example.name}: no kind of edit; the reward needs one.", "Choose data that name it.")


def reward_inputs(batch: ExampleBatch, edited: UInt8[np.ndarray, "P G H W 3"], reward: Reward) -> RewardInputs:
    """What a reward is given of examples and their edits, without the rows that repeat: scores may cost money."""
    own = slice(batch.count)
    return RewardInputs(
        _unit(batch.pixels[own]),
        _unit(edited[own]),
        jnp.asarray(batch.masks[own]),
        tuple(batch.instructions[own]),
        _unit(batch.targets[own]) if reward.needs_target else None,
        tuple(example.caption for example in batch.own) if reward.needs_caption else None,
        tuple(example.task for example in batch.own) if reward.needs_task else None,
    )


def _unit(pixels: UInt8[np.ndarray, "*batch"]) -> Float[Array, "*batch"]:
    return jnp.asarray(pixels, jnp.float32) / 255


def summarise(scores: Table) -> Summary:
    """Splits the variance of scores into that of examples and that of repeats.

    With `s_n^2` the variance of the `r_n` repeats of example n, repeats have the variance `W = mean_n s_n^2`, and
    examples that of their means less what repeats add to it, `var_n(mean) - mean_n(W / r_n)`, not below 0.
    """
    known = np.isfinite(scores)
    counts = known.sum(axis=1)
    means = _means(scores)
    squares = np.where(known, (scores - means[:, None]) ** 2, 0).sum(axis=1)
    several, scored = counts > 1, counts > 0
    within = (squares[several] / (counts[several] - 1)).mean() if several.any() else np.nan
    between = means[scored].var(ddof=1) - (within / counts[scored]).mean() if scored.sum() > 1 else np.nan
    return Summary(
        mean_interval(means[None]),
        float(np.sqrt(within)),
        float(np.sqrt(np.maximum(between, 0))),
        float(1 - known.mean()),
    )


def win_rate(scores: Table, other: Table) -> Interval:
    """How often pictures are preferred to others of the same examples; a tie is half a win.

    Repeat r of one meets repeat r of the other, and an example counts with the mean of its repeats.
    """
    wins = np.where(np.isfinite(scores) & np.isfinite(other), (np.sign(scores - other) + 1) / 2, np.nan)
    return share_interval(_means(wins))


def win_rates(scores: Mapping[str, Table]) -> dict[tuple[str, str], Interval]:
    """`win_rate` of every two, the earlier over the later."""
    return {pair: win_rate(*(scores[name] for name in pair)) for pair in combinations(scores, 2)}


def _means(table: Table) -> Float[np.ndarray, " N"]:
    """The means over the repeats that have a value; NaN where none has."""
    known = np.isfinite(table)
    counts = known.sum(axis=1)
    return np.where(counts > 0, np.where(known, table, 0).sum(axis=1) / np.maximum(counts, 1), np.nan)
