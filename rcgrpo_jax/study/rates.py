"""How often something is chosen, in votes of several voters on several examples: pure functions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse, stats
from scipy.sparse.linalg import lsqr

from rcgrpo_jax.evaluation.statistics import LEVEL, Interval


def pooled_rate(
    chosen: Bool[np.ndarray, " V"], voters: Int[np.ndarray, " V"], examples: Int[np.ndarray, " V"]
) -> Interval:
    """Estimates how often it is chosen, over all voters and all examples, from `V` votes.

    Votes of one voter are alike, and so are votes on one example: neither are `V` independent draws. With the residuals
    `e = chosen - p`, S voters and N examples, sums over a voter's and over an example's votes give

        A = S / (S - 1)  sum_s (sum of e of voter s)^2  / V^2
        B = N / (N - 1)  sum_n (sum of e of example n)^2 / V^2
        C = var(residuals of voter + example, fitted by least squares) / V

    the variances by cluster of Cameron, Gelbach and Miller (2011). Both A and B hold the noise C. As in
    `statistics.mean_interval`, which is the same where every voter has voted on every example,

        h^2 = max( t_{N-1}^2 B, t_{S-1}^2 A + t_{N-1}^2 max(B - C, 0) )

    is the squared half width about a mean. For a rate it becomes Wilson's interval of as many independent votes as have
    this h (Dean and Pagano 2015): it stays in [0, 1], and has a width where all votes agree, where an example counts as
    one vote. There are never more such votes than votes. A single voter has no A: the interval is over examples alone.

    Args:
        chosen: Whether each vote is for it.
        voters: Who voted.
        examples: On what.

    Returns:
        The rate and its 95 % bounds; all NaN if there are no votes.
    """
    count = len(chosen)
    if not count:
        return Interval(np.nan, np.nan, np.nan)
    rate = float(np.mean(chosen))
    voter_of, example_of = (np.unique(ids, return_inverse=True)[1] for ids in (voters, examples))
    left = chosen - rate
    of_voters, of_examples = _between(left, voter_of), _between(left, example_of)
    certain, few = _square(example_of), _square(voter_of)
    rest = _rest(left, voter_of, example_of)
    half = max(certain * of_examples, few * of_voters + certain * max(of_examples - rest, 0))
    normal, units = stats.norm.ppf((1 + LEVEL) / 2) ** 2, int(example_of.max()) + 1
    if (spread := rate * (1 - rate)) > 0:
        return _wilson(rate, max(half / spread, normal / count))
    return _wilson(rate, (certain or normal) / units)


def _between(left: Float[np.ndarray, " V"], group_of: Int[np.ndarray, " V"]) -> float:
    """The variance of the mean by clusters; 0 for a single one, which does not tell."""
    sums = np.bincount(group_of, left)
    return len(sums) / (len(sums) - 1) * float(np.sum(sums**2)) / len(left) ** 2 if len(sums) > 1 else 0.0


def _rest(left: Float[np.ndarray, " V"], voter_of: Int[np.ndarray, " V"], example_of: Int[np.ndarray, " V"]) -> float:
    """The share of the mean's variance that neither voters nor examples cause; 0 where it cannot be told."""
    count = len(left)
    free = count - voter_of.max() - example_of.max() - 1
    if free < 1:
        return 0.0
    rows, ones = np.arange(count), np.ones(count)
    design = sparse.hstack([sparse.csr_array((ones, (rows, group))) for group in (voter_of, example_of)])
    fitted = design @ lsqr(design, left, atol=1e-10, btol=1e-10)[0]
    return float(np.sum((left - fitted) ** 2)) / free / count


def _square(group_of: Int[np.ndarray, " V"]) -> float:
    """The squared quantile of Student's t for so many groups; 0 for a single one."""
    freedom = int(group_of.max())
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom)) ** 2 if freedom else 0.0


def _wilson(rate: float, square: float) -> Interval:
    """Wilson's score interval, `square` being that of the quantile over the number of votes."""
    centre, scale = rate + square / 2, 1 + square
    half = np.sqrt(square * rate * (1 - rate) + square**2 / 4)
    return Interval(rate, float((centre - half) / scale), float((centre + half) / scale))
