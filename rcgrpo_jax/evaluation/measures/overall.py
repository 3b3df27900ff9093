"""The oracle's whole judgement of an edit."""

from __future__ import annotations

from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs
from rcgrpo_jax.evaluation.measures.success import TARGETS
from rcgrpo_jax.rewards.oracle import oracle_scores


def overall(inputs: MeasureInputs) -> Float[Array, " P"]:
    """Computes the oracle's `overall / 10` (`rewards.oracle.oracle_scores`): success, background, seams and artefacts.

    Args:
        inputs: A batch with targets.

    Returns:
        Values in [0, 1], float32.
    """
    scores = oracle_scores(inputs.source, inputs.edited[:, None], inputs.mask, inputs.target)
    return scores["overall"][:, 0] / 10


OVERALL = Measure("overall", "overall", 3, "↑", overall, needs=("target",), wanted=TARGETS)
