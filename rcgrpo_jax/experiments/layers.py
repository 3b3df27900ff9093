"""Which blocks' ACD tells good rollouts from bad (Appendix D.1): every block alone, and the last L together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.separation import between_rollouts, concordance, interval, within_prompts
from rcgrpo_jax.evaluation.statistics import LEVEL, Interval, mean_interval
from rcgrpo_jax.experiments.rollout_log import PARTS, Rollouts

MEDIAN = "median"
CHANCE = 0.5


class Counts(NamedTuple):
    """What a diagnosis is of."""

    examples: int
    rollouts: int  # with a score and a finite ACD
    unscored: int
    not_finite: int  # with a score, and without a finite ACD
    successes: int
    failures: int
    prompts: int  # with rollouts of different scores


@dataclass(frozen=True)
class BlockSet:
    """How well the ACD of some blocks, meaned over them, tells rollouts apart: areas with 95 % intervals."""

    blocks: tuple[int, ...]  # from 0
    across: Interval  # successes from failures, over all rollouts
    within: Interval  # the better of two rollouts of one prompt from the other
    early: Interval  # the same by the noisier half of the steps
    late: Interval  # by the cleaner half
    across_direction: int  # 1 above chance, -1 below, 0 not told from it; corrected for the number of sets
    within_direction: int


@dataclass(frozen=True)
class Choice:
    """What is best by `within`.

    The best of several looks better than it is. `held_out` and `gain` are free of that: the choice is made on every
    second prompt and measured on the others, and the other way round.
    """

    layers: int  # L of the best last blocks: `acd.layers`
    as_good: tuple[int, ...]  # L that are not worse with certainty, by the 95 % interval of the difference in pairs
    block: int  # the best alone
    held_out: Interval  # of the best last blocks
    gain: Interval  # of the best block alone over the best last blocks


@dataclass(frozen=True)
class Diagnosis:
    """What the rollouts say of the blocks of a model."""

    threshold: float  # a score from which a rollout is a success
    counts: Counts
    single: tuple[BlockSet, ...]  # each block
    last: tuple[BlockSet, ...]  # the last 1, 2, ... blocks
    choice: Choice


def parse_threshold(text: str) -> float | None:
    """The threshold that `--threshold` names; None for the median.

    Raises:
        UsageError: It is neither that nor a finite number.
    """
    if text == MEDIAN:
        return None
    try:
        found = float(text)
    except ValueError:
        found = np.nan
    if not np.isfinite(found):
        raise UsageError(
            f"--threshold: {text!r} found; a number or {MEDIAN} was wanted.", "For example --threshold 0.5."
        )
    return found


def diagnose(rollouts: Rollouts, threshold: float | None = None) -> Diagnosis:
    """Separates good rollouts from bad by the ACD of every block, and of the last L blocks.

    Args:
        rollouts: Of at least two examples in at least two noises.
        threshold: A score of so much is a success; None: the median of all.

    Raises:
        UserError: No rollout has a score, all are successes or failures, or no two of one prompt differ in score.
    """
    scores = rollouts.scores
    finite = np.isfinite(rollouts.densities).all(axis=(2, 3))
    used = np.isfinite(scores) & finite
    _check_scored(rollouts, used)
    threshold = float(np.median(scores[used])) if threshold is None else threshold
    success = used & (scores >= threshold)
    counts = Counts(
        len(scores), int(used.sum()), int((~np.isfinite(scores)).sum()), int((np.isfinite(scores) & ~finite).sum()),
        int(success.sum()), int((used & ~success).sum()), int(sum(len(np.unique(x)) > 1 for x in _rows(scores, used))),
    )  # fmt: skip
    _check_outcomes(counts, threshold, scores[used])
    kept, densities = np.where(used, scores, np.nan), np.where(used[..., None, None], rollouts.densities, np.nan)
    blocks = densities.shape[-1]
    sets = [(block,) for block in range(blocks)] + [tuple(range(blocks - L, blocks)) for L in range(1, blocks + 1)]
    found, shares = zip(*(_separate(densities, kept, success, chosen, blocks) for chosen in sets), strict=True)
    choice = _choose(np.stack(shares[:blocks]), np.stack(shares[blocks:]))
    return Diagnosis(threshold, counts, found[:blocks], found[blocks:], choice)


def _rows(scores: Float[np.ndarray, "N S"], used: Bool[np.ndarray, "N S"]) -> list[Float[np.ndarray, " _"]]:
    return [row[kept] for row, kept in zip(scores, used, strict=True)]


def _check_scored(rollouts: Rollouts, used: Bool[np.ndarray, "N S"]) -> None:
    if not used.any():
        causes = f": {rollouts.causes[0]}" if rollouts.causes else "."
        raise UserError(
            f"none of {used.size} rollouts has a score and a finite ACD{causes}", "See what the reward wants."
        )


def _check_outcomes(counts: Counts, threshold: float, scores: Float[np.ndarray, " _"]) -> None:
    """Refuses rollouts that nothing could separate."""
    low, high = scores.min(), scores.max()
    if not counts.successes or not counts.failures:
        found = "successes" if counts.successes else "failures"
        remedy = f"Choose a threshold above {low:.6g}, up to {high:.6g}." if low < high else "Choose another reward."
        raise UserError(
            f"--threshold: with {threshold:.6g} all {counts.rollouts} rollouts are {found} (scores from {low:.6g} to "
            f"{high:.6g}); some of either kind were wanted.",
            remedy,
        )
    if counts.prompts < 2:
        raise UserError(
            f"{counts.prompts} of {counts.examples} prompts have rollouts of different scores; 2 at least were wanted.",
            "Raise --seeds or --examples, or choose a reward that tells edits of one prompt apart.",
        )


def _separate(
    densities: Float[np.ndarray, "N S 3 L"], scores: Float[np.ndarray, "N S"], success: Bool[np.ndarray, "N S"],
    blocks: Sequence[int], count: int,
) -> tuple[BlockSet, Float[np.ndarray, " N"]]:  # fmt: skip
    """How well some blocks tell rollouts apart, and the share of pairs that they order in each prompt.

    Args:
        densities: NaN where a rollout does not count.
        scores: Likewise.
        success: Which succeeded.
        blocks: Whose mean it is.
        count: How many sets there are of the kind: 1 - 0.05 / count is the level of the directions (Bonferroni).
    """
    means = densities[..., list(blocks)].mean(axis=-1)  # [N, S, 3]
    shares = [concordance(means[..., part], scores) for part in range(len(PARTS))]
    areas = [between_rollouts(means[..., 0], success), *map(within_prompts, shares)]
    corrected = [interval(area, 1 - (1 - LEVEL) / count) for area in areas[:2]]
    directions = [int(x.low > CHANCE) - int(x.high < CHANCE) for x in corrected]
    return BlockSet(tuple(blocks), *map(interval, areas), *directions), shares[0]


def _choose(single: Float[np.ndarray, "L N"], last: Float[np.ndarray, "L N"]) -> Choice:
    """The best of the blocks and of the last blocks, from the shares of each prompt."""
    kept = np.isfinite(last[0])  # the same prompts for all
    single, last = single[:, kept], last[:, kept]
    best = int(last.mean(axis=1).argmax())
    worse = [mean_interval((last[best] - row)[None]).low > 0 for row in last]
    held_out = _held_out(last)
    return Choice(
        best + 1,
        tuple(L for L, is_worse in enumerate(worse, start=1) if not is_worse),
        int(single.mean(axis=1).argmax()),
        interval(within_prompts(held_out)),
        mean_interval((_held_out(single) - held_out)[None]),
    )


def _held_out(shares: Float[np.ndarray, "M N"]) -> Float[np.ndarray, " N"]:
    """The shares of each prompt by the row that is best on the other half, which is every second prompt."""
    even, odd = shares[:, ::2], shares[:, 1::2]
    found = np.empty(shares.shape[1])
    found[::2] = even[odd.mean(axis=1).argmax()]
    found[1::2] = odd[even.mean(axis=1).argmax()]
    return found
