"""What trainings cost: model evaluations, which do not depend on the machine, and the time of a step on this one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

from annotated_types import Ge
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform, parse_json
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.tables import Table
from rcgrpo_jax.flow.solvers import num_evaluations
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.policy import POLICIES
from rcgrpo_jax.runs.metrics import METRICS, read_metrics
from rcgrpo_jax.runs.workdir import write_text

BACKWARD = 2  # a velocity's backward pass, in forward passes
TIMES = ("seconds/data", "seconds/rollout", "seconds/reward", "seconds/update")


def evaluations_of_step(options: Options) -> int:
    """What a training step costs, in forward passes of the network: those of rollouts, and of `objective.updates`.

    A velocity that is differentiated counts as `1 + BACKWARD`. What checkpointing computes again does not count.
    """
    policy, rollout = POLICIES[options.policy], options.rollout
    rolled_out = rollout.prompts * rollout.group_size * num_evaluations(rollout.solver, rollout.num_steps)
    update = policy.num_evaluations(options.step) * (1 + BACKWARD) + policy.num_forwards(options.step)
    return rolled_out + options.objective.updates * update


class _Stored(TypedDict):
    __pydantic_config__ = STRICT

    steps: Annotated[int, Ge(0)]
    evaluations: Annotated[int, Ge(0)]
    seconds_a_step: Annotated[float, Ge(0)]


class Cost(NamedTuple):
    """Of one training."""

    steps: int
    evaluations: int  # in forward passes
    seconds_a_step: float  # median, which leaves out the compilation

    @classmethod
    def of_run(cls, options: Options, workdir: Path) -> Cost:
        """What a run that has ended took.

        Raises:
            UserError: Its metrics cannot be read.
        """
        seconds = [sum(line.get(name, 0.0) for name in TIMES) for line in read_metrics(workdir / METRICS)]
        steps = options.train.num_steps
        return cls(steps, steps * evaluations_of_step(options), median(seconds))

    def save(self, file: Path) -> None:
        """Writes it as JSON."""
        write_text(file, json.dumps(self._asdict(), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Cost | None:
        """What was saved there; None if nothing was.

        Raises:
            UserError: The file is not such a one.
        """
        remedy = "Delete it; its row has no cost then."
        try:
            return cls(**conform(parse_json(file.read_text(encoding="utf-8")), _Stored, str(file), remedy))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}).", remedy) from None


def cost_table(costs: Mapping[str, Sequence[Cost | None]]) -> Table:
    """Steps, evaluations and time of each row's trainings; a row without all costs has none.

    Args:
        costs: Row -> one a seed.
    """
    lines = [["variant", "training steps", "evaluations a run", "seconds a step", "minutes a run"]]
    for name, found in costs.items():
        known = [cost for cost in found if cost]
        if not known or len(known) < len(found):
            lines.append([name, *[""] * 4])
            continue
        seconds = median(cost.seconds_a_step for cost in known)
        minutes = median(cost.steps * cost.seconds_a_step / 60 for cost in known)
        lines.append([name, str(known[0].steps), f"{known[0].evaluations:,}", f"{seconds:.2f}", f"{minutes:.1f}"])
    return Table("cost, median over seeds, without compilation", lines)
