"""What a policy gives to the training step: what is random, what a unit of the update is, and what it minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.flow.solvers.base import Velocity, VelocityWithAux
from rcgrpo_jax.rl.options import StepOptions
from rcgrpo_jax.runs.state import TrainState

# Fields of policies whose rollout takes a group at once, and whose candidates start equal outside the region.
SHARING = ("rollout.share", "rollout.share_grow", "rollout.share_grow_reference", "rollout.share_full_steps")


class Prompts(NamedTuple):
    """What the device keeps of a batch, one row a prompt."""

    condition: Any  # of the networks
    text_weights: Float[Array, "P N_txt"]
    region: Float[Array, "P N"]  # M on the token grid: surrogate and ACD
    explored: Float[Array, "P N"]  # M, perhaps dilated: the perturbation


class Exploration(Protocol):
    """The random choices of one step: a tree of arrays, of which those of the candidates are rolled out in parts."""

    @property
    def candidates(self) -> Any:
        """What a candidate's rollout starts from: a tree of arrays `[P, G, ...]`."""


class Rollout(NamedTuple):
    """Candidates under the old parameters."""

    states: Float[Array, "P G K+1 N C"]  # float32: rounded states would break the ratio
    acd: Float[Array, "P G"]  # R_acd; zeros if ACD is off


class Velocities(NamedTuple):
    """`v(., ., c)` of one sample under three adapters; what is not called is not computed."""

    theta: Velocity  # the one that is trained, with gradient
    old: Velocity | None  # `TrainState.old`, where it is kept
    base: Velocity  # none
    shared: Callable[
        [Array, Array, Array], Array
    ]  # theta again: (candidate 0, others [g, N, C], sigma) -> of the others


class Policy(Protocol):
    """How a group explores, and what an update learns from it.

    A unit is what an update differentiates at once.

    Args:
        options: The run's.
        networks: The networks.
        sigmas: The times of a rollout, `[K+1]`.

    Attributes:
        OWN: Fields, or groups of fields, that not every policy reads: where another policy is chosen that has not the
            same field among its own, they stay at their defaults.
        keeps_old: Whether rollouts are those of `TrainState.old`, which follows the trained adapter by `refresh`.
    """

    OWN: tuple[str, ...]
    keeps_old: bool

    def __init__(self, options: StepOptions, networks: Networks, sigmas: Float[Array, " K+1"]): ...

    @staticmethod
    def problems(options: StepOptions) -> list[str]:
        """What is wrong with options for this policy, a line each."""

    @staticmethod
    def num_units(options: StepOptions) -> int:
        """U, the units of an update over the whole batch."""

    @staticmethod
    def num_evaluations(options: StepOptions) -> int:
        """Velocities that an update differentiates, over the whole batch."""

    @staticmethod
    def num_forwards(options: StepOptions) -> int:
        """Velocities that an update computes beside them without a gradient: of the old adapter, of the base."""

    def explore(self, key: PRNGKeyArray, prompts: Prompts, step: Int[Array, ""]) -> Exploration:
        """Draws what is random in a step; `step` counts those that are done."""

    def rollout(
        self, velocity: VelocityWithAux, prompt: Prompts, candidate: Any
    ) -> tuple[Float[Array, "K+1 N C"], Any]:
        """The states of one candidate under the parameters that roll out, float32, and the aux of every step.

        With `SHARING` among `OWN`, a candidate may be a group of them, and the states `[K+1, G, N, C]`.

        Args:
            velocity: Of these parameters.
            prompt: One row.
            candidate: A row of `Exploration.candidates`.
        """

    def units(self, exploration: Exploration) -> tuple[Array, ...]:
        """The units, arrays with a leading axis U; the first is each unit's prompt."""

    def kept_shape(self) -> tuple[int, ...]:
        """The shape, from U on, of what the later updates on a rollout know of the first, such as `log pi_old`."""

    def read(self, states: Float[Array, "P G K+1 N C"], unit: tuple[Array, ...]) -> Any:
        """What a unit needs of the rollout, a tree of arrays."""

    def loss(
        self,
        velocities: Velocities,
        prompt: Prompts,
        stored: Any,
        unit: tuple[Array, ...],
        advantages: Float[Array, " G"],
        kept: Array,
        first: Bool[Array, ""],
    ) -> tuple[Float[Array, ""], Array, dict[str, Array]]:
        """What one unit minimises, what later updates are to know of it, and metrics.

        A metric is meaned over units; one whose name ends in `_deviation` is the largest of all.

        Args:
            velocities: Of the unit's prompt.
            prompt: One row.
            stored: Of `read`.
            unit: A row of `units`.
            advantages: Of the unit's group.
            kept: What the first update on this rollout gave; anything in the first.
            first: Whether this is the first update on the rollout.
        """

    def refresh(self, state: TrainState) -> TrainState:
        """The state after the updates on a rollout, with `old` moved towards the trained adapter; if it is kept."""
