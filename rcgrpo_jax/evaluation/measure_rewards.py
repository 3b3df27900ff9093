"""Measures of edits as rewards, for those who ask a reward which of several edits are good."""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.measures import REGISTERED, Measure
from rcgrpo_jax.evaluation.measures.base import MeasureInputs
from rcgrpo_jax.rewards.base import Factory, RewardInputs


def measure_rewards() -> dict[str, Factory]:
    """The measures that can be rewards: name -> factory.

    They are those of which more is better and that look at the pictures and the target alone.
    """
    fitting = (
        x for x in REGISTERED.values() if x.better == "↑" and {*x.needs} <= {"target"} and not (x.read or x.load)
    )
    return {measure.name: partial(_MeasureReward, measure) for measure in fitting}


class _MeasureReward:
    """A measure of each candidate."""

    def __init__(self, measure: Measure):
        self.needs_target = "target" in measure.needs
        self._compute = jax.jit(jax.vmap(measure.compute, (MeasureInputs(None, 1, None, None, None),), 1))

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        return self._compute(MeasureInputs(inputs.source, inputs.edited, inputs.mask, inputs.targets))
