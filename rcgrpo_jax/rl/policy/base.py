"""What a policy gives to the training step: what is random, what is compared, and how many units an update has."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, PRNGKeyArray

from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.flow.solvers.base import Velocity, VelocityWithAux
from rcgrpo_jax.rl.options import StepOptions


class Prompts(NamedTuple):
    """What the device keeps of a batch, one row a prompt."""

    condition: Any  # of the networks
    text_weights: Float[Array, "P N_txt"]
    region: Float[Array, "P N"]  # M on the token grid: surrogate and ACD
    explored: Float[Array, "P N"]  # M, perhaps dilated: the perturbation


class Exploration(Protocol):
    """The random choices of one step; a NamedTuple of arrays with these and the policy's own."""

    noise: Float[Array, "P G N C"]  # initial noises


class Rollout(NamedTuple):
    """Candidates under the old parameters."""

    states: Float[Array, "P G K+1 N C"]  # float32: rounded states would break the ratio
    acd: Float[Array, "P G"]  # R_acd; zeros if ACD is off


class Policy(Protocol):
    """How a group explores and how its candidates are compared.

    A unit is what an update differentiates at once. It compares M members at T solver steps: `log pi_theta [T, M]`.

    Args:
        options: The run's.
        networks: The networks.
        sigmas: The times of a rollout, `[K+1]`.
    """

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

    def explore(self, key: PRNGKeyArray, prompts: Prompts) -> Exploration:
        """Draws what is random in a step."""

    def rollout(self, velocity: VelocityWithAux, noise: Float[Array, "N C"]) -> tuple[Float[Array, "K+1 N C"], Any]:
        """The states of one candidate under the old parameters, and the aux of every step."""

    def units(self, exploration: Exploration) -> tuple[Array, ...]:
        """The units, arrays with a leading axis U; the first is each unit's prompt."""

    def log_policy_shape(self) -> tuple[int, int, int]:
        """(U, T, M)."""

    def read(self, states: Float[Array, "P G K+1 N C"], unit: tuple[Array, ...]) -> Any:
        """What a unit needs of the rollout, a tree of arrays."""

    def log_policy(
        self, velocity: Velocity, prompt: Prompts, stored: Any, unit: tuple[Array, ...]
    ) -> tuple[Float[Array, "T M"], dict[str, Array]]:
        """`log pi_theta` of one unit, with gradient, and metrics of it.

        Args:
            velocity: `v_theta(., ., c)`.
            prompt: One row.
            stored: Of `read`.
            unit: A row of `units`.
        """

    def advantages(self, advantages: Float[Array, " G"], unit: tuple[Array, ...]) -> Float[Array, " M"]:
        """The members' advantages, of those of the unit's group."""

    def weights(self, log_old: Float[Array, "T M"]) -> Float[Array, "T M"] | None:
        """The members' weights in the objective (Eq. 5); None: 1 / M each."""
