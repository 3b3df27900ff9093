"""How well a number tells good rollouts from bad ones: AUC over all rollouts and within prompts, with their intervals.

The rollouts of one prompt are not independent, so that the intervals count prompts. They are in closed form, as those
of `evaluation.statistics`: DeLong's for clusters (Obuchowski 1997), on the scale of log odds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import special, stats

from rcgrpo_jax.evaluation.statistics import LEVEL, Interval, share_interval


class Separation(NamedTuple):
    """An area under the curve, and what each prompt adds to its error."""

    area: float  # 0.5: chance, 1: every good rollout has more than every bad one; NaN where there are no pairs
    parts: Float[np.ndarray, " N"]  # of the prompts that count; they sum to 0


def between_rollouts(values: Float[np.ndarray, "N S"], success: Bool[np.ndarray, "N S"]) -> Separation:
    """Computes the AUC over all rollouts, P(v+ > v-) + P(v+ = v-) / 2 of a success v+ and a failure v-, of any prompts.

    With `V_j` the share of failures below success j, and of successes above failure j (ties are halves), the AUC `A` is
    the mean of either, by their ranks. Prompt n adds `sum_j (V_j - A) / m` over its successes and failures, `m` the
    number of all successes, or failures (DeLong 1988, summed over clusters as Obuchowski 1997 does).

    Args:
        values: What shall tell them apart, of N prompts in S rollouts; rollouts with NaN are left out.
        success: Which rollouts succeeded.
    """
    prompts = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
    known = np.isfinite(values)
    ranks = stats.rankdata(values[known])
    good = success[known]
    if good.all() or not good.any():
        return Separation(np.nan, np.zeros(len(values)))
    placements = np.empty(len(ranks))
    placements[good] = (ranks[good] - stats.rankdata(ranks[good])) / np.sum(~good)
    placements[~good] = 1 - (ranks[~good] - stats.rankdata(ranks[~good])) / np.sum(good)
    area = placements[good].mean()
    weights = (placements - area) / np.where(good, np.sum(good), np.sum(~good))
    parts = np.bincount(prompts[known], weights, minlength=len(values))
    return Separation(float(area), parts[known.any(axis=1)])


def concordance(values: Float[np.ndarray, "N S"], scores: Float[np.ndarray, "N S"]) -> Float[np.ndarray, " N"]:
    """Computes of each prompt how often the better of two of its rollouts has the higher value; ties are halves.

    This is what a reward is asked for: advantages are within a group. Two rollouts are a pair where their scores
    differ; no threshold plays a part. With scores of 0 and 1 it is the AUC of the prompt.

    Args:
        values: What shall tell them apart, of N prompts in S rollouts.
        scores: How good each is. Rollouts with NaN in either are left out.

    Returns:
        The share of each prompt, in [0, 1]; NaN where no two scores differ.
    """
    known = np.isfinite(values) & np.isfinite(scores)
    values, scores = np.where(known, values, 0), np.where(known, scores, 0)
    better = (scores[:, :, None] > scores[:, None, :]) & known[:, :, None] & known[:, None, :]
    wins = (np.sign(values[:, :, None] - values[:, None, :]) + 1) / 2
    pairs = better.sum(axis=(1, 2))
    return np.where(pairs > 0, np.where(better, wins, 0).sum(axis=(1, 2)) / np.maximum(pairs, 1), np.nan)


def within_prompts(shares: Float[np.ndarray, " N"]) -> Separation:
    """Averages `concordance` over the prompts that have one, each with the same weight."""
    kept = shares[np.isfinite(shares)]
    if not len(kept):
        return Separation(np.nan, np.zeros(0))
    return Separation(float(kept.mean()), (kept - kept.mean()) / len(kept))


def interval(found: Separation, level: float = LEVEL) -> Interval:
    """Estimates how far an area can be trusted, from how the N prompts differ.

    The error's variance is `N / (N - 1) sum_n part_n^2`. The interval is Student's with N - 1 degrees of freedom for
    `log(A / (1 - A))`, so that it stays in [0, 1]. Where the prompts show no variance, as where all pairs are won, or
    all lost, it is Wilson's for N of this share.

    Of 1,000 draws it held the truth in 92 to 100 %, for 5 to 50 prompts of 2 and 8 rollouts, areas from 0.5 to 0.94,
    and prompts that differ in their values by none to three times what the rollouts of one do. It is 92 % over all
    rollouts of 5 to 20 prompts that differ most, and 94 to 97 % for 50 prompts.

    Args:
        found: Of `between_rollouts` or `within_prompts`.
        level: How often it shall hold the truth.

    Returns:
        The area and its bounds; these are NaN for fewer than two prompts.
    """
    area, count = found.area, len(found.parts)
    if not np.isfinite(area) or count < 2:
        return Interval(area, np.nan, np.nan)
    if area in (0, 1) or np.allclose(found.parts, 0, atol=1e-12):
        return share_interval(np.full(count, area), level)
    error = np.sqrt(count / (count - 1) * np.sum(found.parts**2))
    half = stats.t.ppf((1 + level) / 2, count - 1) * error / (area * (1 - area))
    odds = special.logit(area)
    low, high = special.expit([odds - half, odds + half])
    return Interval(area, float(low), float(high))
