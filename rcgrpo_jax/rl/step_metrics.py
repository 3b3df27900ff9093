"""What a step reports of its candidates: rewards, groups that teach nothing, how far region and background move."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcgrpo_jax.method import grpo
from rcgrpo_jax.parallel.distributed import gather
from rcgrpo_jax.rewards.base import Reward, RewardInputs


def _whole(x: np.ndarray) -> np.ndarray:
    """The rows, one a group, that are finite throughout: one candidate that diverged must not hide the others."""
    return x[np.isfinite(x).all(axis=tuple(range(1, x.ndim)))]


def _mean(x: np.ndarray) -> float:
    """The mean; NaN, without NumPy's warning, of nothing."""
    return float(x.mean()) if x.size else float("nan")


def reward_metrics(scores: Mapping[str, np.ndarray], total: Array) -> dict[str, float]:
    """The rewards that are learned from, each in four numbers, and the groups and candidates that teach nothing.

    The numbers are a reward's mean, its mean within-group std, and the shares of candidates without a score and of
    groups without a spread.

    Args:
        scores: Reward -> `[P, G]`, of those with a weight.
        total: Their weighted sum, `[P, G]`.
    """
    metrics = _summaries("reward", scores)
    metrics |= {f"reward_zero_std/{name}": _zero_std(x) for name, x in {**scores, "total": total}.items()}
    scored = np.isfinite(total)
    metrics["reward_std/total"] = _mean(_group_std(np.asarray(total)))
    metrics["groups/zero_std"] = float(grpo.zero_std_groups(total).sum())
    metrics["groups/dropped"] = float((~scored.any(axis=-1)).sum())
    metrics["candidates/missing"] = float((~scored[scored.any(axis=-1)]).sum())  # of the other groups
    return metrics


def judge_metrics(rewards: Mapping[str, Reward]) -> dict[str, float]:
    """What the rewards have measured of their scoring; of several processes, the largest value of each."""
    found = {f"judge/{name}/{key}": x for name, reward in rewards.items() for key, x in reward.metrics().items()}
    if not found:
        return {}
    return {name: float(x) for name, x in zip(found, gather(np.array([[*found.values()]])).max(0), strict=True)}


def watch_metrics(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean, mean within-group std and share of failed candidates of the rewards that are not learned from."""
    return _summaries("watch", scores)


def correlation_metrics(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far two rewards agree on the candidates of a group, for each two of them.

    Pearson's correlation within a group, meaned over the groups in which both are known of all candidates and differ;
    NaN where there is none.
    """
    differ = {name: ~np.asarray(grpo.zero_std_groups(x)) for name, x in scores.items()}
    return {
        f"reward_corr/{one}-{other}": _correlation(*(scores[x][differ[one] & differ[other]] for x in (one, other)))
        for one, other in combinations(sorted(scores), 2)
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of the groups that are known whole; their scores differ in both."""
    both = _whole(np.stack([a, b], axis=1, dtype=np.float64))  # [P', 2, G]
    centred = both - both.mean(axis=-1, keepdims=True)
    return _mean((centred[:, 0] * centred[:, 1]).mean(axis=-1) / both.std(axis=-1).prod(axis=-1))


def _summaries(kind: str, scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    metrics = {}
    for name, score in scores.items():
        metrics[f"{kind}/{name}"] = _mean(score[np.isfinite(score)])
        metrics[f"{kind}_std/{name}"] = _mean(_group_std(score))
        metrics[f"{kind}_failed/{name}"] = float(1 - np.isfinite(score).mean())
    return metrics


def _group_std(score: np.ndarray) -> np.ndarray:
    """Standard deviations within groups, of the candidates that have a score; none of a group without any."""
    return np.ma.masked_invalid(score).std(axis=-1).compressed()


def _zero_std(score: np.ndarray | Array) -> float:
    return float(grpo.zero_std_groups(score).mean())


@jax.jit
def _difference(a: Array, b: Array, where: Array) -> Array:
    """Mean absolute difference of pictures from others, or from one a prompt, in a part, `[P, G]`, in [0, 1]."""
    part = jnp.broadcast_to(where[:, None, :, :, None], a.shape)
    return (part * jnp.abs(a - b)).sum((2, 3, 4)) / jnp.maximum(part.sum((2, 3, 4)), 1.0)


def _drift(edits: RewardInputs, where: Array) -> Float[Array, " P"]:
    """How far perturbed candidates are from each other in a part of the picture, mean absolute, in [0, 1].

    Each is compared with the next. Candidate 0 is left out: under RDP it is the unperturbed reference, to which all
    others are nearer than to each other. NaN for a group of two.
    """
    return _difference(edits.edited[:, 1:-1], edits.edited[:, 2:], where).mean(-1)


def background_drift(edits: RewardInputs) -> Float[Array, " P"]:
    """`_drift` outside the mask (Fig. 5b)."""
    return _drift(edits, 1.0 - edits.mask)


def background_error(edits: RewardInputs) -> Float[Array, "P G"]:
    """How far edits are from their source outside the mask, mean absolute, in [0, 1]."""
    return _difference(edits.edited, edits.source[:, None], 1.0 - edits.mask)


def drift_metrics(edits: RewardInputs) -> dict[str, float]:
    """How far background and region move: between candidates, and from the source; of groups without a NaN."""
    measured = {
        "background/drift": background_drift(edits),
        "background/error": background_error(edits),
        "region/drift": _drift(edits, edits.mask),
        "region/change": _difference(edits.edited, edits.source[:, None], edits.mask),
    }
    return {name: _mean(_whole(gather(x))) for name, x in measured.items()}
