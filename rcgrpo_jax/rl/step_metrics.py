"""What a step reports of its candidates: rewards, groups that teach nothing, and how far backgrounds move."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcgrpo_jax.method import grpo
from rcgrpo_jax.parallel.distributed import gather
from rcgrpo_jax.rewards.base import RewardInputs


def _whole(x: np.ndarray) -> np.ndarray:
    """The rows, one a group, that are finite throughout: one candidate that diverged must not hide the others."""
    return x[np.isfinite(x).reshape(len(x), -1).all(axis=-1)]


def _mean(x: np.ndarray) -> float:
    """The mean; NaN, without NumPy's warning, of nothing."""
    return float(x.mean()) if x.size else float("nan")


def reward_metrics(scores: dict[str, np.ndarray], total: Array) -> dict[str, float]:
    """Mean, mean within-group std and share of failed candidates of each reward, and the groups that teach nothing."""
    metrics = {}
    for name, score in scores.items():
        kept = _whole(score)
        metrics[f"reward/{name}"] = _mean(kept)
        metrics[f"reward_std/{name}"] = _mean(kept.std(axis=-1))
        metrics[f"reward_failed/{name}"] = float(1 - np.isfinite(score).mean())
    kept = _whole(np.asarray(total))
    metrics["reward_std/total"] = _mean(kept.std(axis=-1))
    metrics["groups/zero_std"] = float(grpo.zero_std_groups(total).sum())
    metrics["groups/dropped"] = float(len(total) - len(kept))
    return metrics


@jax.jit
def _outside(a: Array, b: Array, mask: Array) -> Array:
    """Mean absolute difference of pictures from others, or from one a prompt, outside the mask, `[P, G]`, in [0, 1]."""
    background = jnp.broadcast_to((1.0 - mask)[:, None, :, :, None], a.shape)
    return (background * jnp.abs(a - b)).sum((2, 3, 4)) / jnp.maximum(background.sum((2, 3, 4)), 1.0)


def background_drift(edits: RewardInputs) -> Float[Array, " P"]:
    """How far the backgrounds of perturbed candidates are from each other's (Fig. 5b), mean absolute, in [0, 1].

    Each is compared with the next. Candidate 0 is left out: under RDP it is the unperturbed reference, to which all
    others are nearer than to each other. NaN for a group of two.
    """
    return _outside(edits.edited[:, 1:-1], edits.edited[:, 2:], edits.mask).mean(-1)


def drift_metrics(edits: RewardInputs) -> dict[str, float]:
    """How far the background moves: from candidate to candidate, and from the source; of groups without a NaN."""
    error = _outside(edits.edited, edits.source[:, None], edits.mask)
    return {
        "background/drift": _mean(_whole(gather(background_drift(edits)))),
        "background/error": _mean(_whole(gather(error))),
    }
