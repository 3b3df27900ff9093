"""How much of the text's attention the edit region had while the edit was made."""

from __future__ import annotations

from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures.base import Measure, MeasureInputs


def acd(inputs: MeasureInputs) -> Float[Array, " P"]:
    """R_acd (Eq. 18) of the rollout, which only the rollout knows (`evaluation.edit`): pictures do not show it."""
    return inputs.acd


ACD = Measure("acd", "ACD", 3, "↑", acd, needs=("acd",), wanted="only the rollout that made an edit knows it")
