"""How right the edit is inside its region."""

from __future__ import annotations

from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs
from rcgrpo_jax.rewards.oracle import FULL, oracle_scores

TARGETS = "it compares with the right result, and an example has no target"


def success(inputs: MeasureInputs) -> Float[Array, " P"]:
    """Computes the oracle's `success / 25` (`rewards.oracle.oracle_scores`).

    Args:
        inputs: A batch with targets.

    Returns:
        Success of the edit inside the region, in [0, 1], float32.
    """
    scores = oracle_scores(inputs.source, inputs.edited[:, None], inputs.mask, inputs.target)
    return scores["success"][:, 0] / FULL


SUCCESS = Measure("success", "edit success", 3, "↑", success, needs=("target",), wanted=TARGETS)
