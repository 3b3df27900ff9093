"""The paper's policy, after Neighbor GRPO: perturbed initial noises, ODE rollouts, and a softmax over neighbours."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.flow import rollout
from rcgrpo_jax.flow.solvers import SOLVERS
from rcgrpo_jax.flow.solvers.base import VelocityWithAux, move
from rcgrpo_jax.flow.solvers.euler import euler_step
from rcgrpo_jax.method import explore, grpo, surrogate
from rcgrpo_jax.rl.options import StepOptions
from rcgrpo_jax.rl.policy import likelihood
from rcgrpo_jax.rl.policy.base import SHARING, Prompts, Velocities
from rcgrpo_jax.rl.policy.noise import initial_noise
from rcgrpo_jax.runs.state import TrainState


class Exploration(NamedTuple):
    """The random choices of one step."""

    noise: Float[Array, "P G N C"]  # initial noises; candidate 0 is the reference itself, not if kind=global
    anchors: Int[Array, "P B"]  # candidates that serve as anchors
    steps: Int[Array, " T"]  # solver steps that carry the loss, in 1..K

    @property
    def candidates(self) -> Float[Array, "P G N C"]:
        """The noises: a rollout is deterministic."""
        return self.noise


class StoredStates(NamedTuple):
    """What a unit reads of the rollout, at its T pairs of an anchor and a solver step."""

    before: Float[Array, "T N C"]  # the anchor's state before the step
    after: Float[Array, "T N C"]  # and after it
    group: Float[Array, "T G N C"]  # all candidates after the step
    start: Float[Array, "N C"]  # the first anchor's noise
    reference: Float[Array, "N C"]  # candidate 0 before the first step


class Neighbour:
    """Candidates are compared by their distance to an anchor's state under theta (Eq. 13-15).

    A unit is a prompt with T pairs of an anchor and a solver step: with `integrate` the compared steps of an anchor's
    whole path, with `replay` one step of one anchor, or where tokens are shared, of all. Members are the group, and the
    source last if it has an advantage (ours).
    """

    OWN = ("surrogate", "objective.source_advantage", "objective.clip", *SHARING)
    keeps_old = False

    def __init__(self, options: StepOptions, networks: Networks, sigmas: Float[Array, " K+1"]):
        self.options, self.networks, self.sigmas = options, networks, sigmas
        self.solver = SOLVERS[options.rollout.solver]

    @staticmethod
    def problems(options: StepOptions) -> list[str]:
        """As `Policy.problems`."""
        problems = []
        compared, g, k = options.surrogate, options.rollout.group_size, options.rollout.num_steps
        if compared.anchors > (perturbed := g - _first_perturbed(options)):
            problems.append(
                f"surrogate.anchors: {compared.anchors} of {perturbed} perturbed candidates; rollout.group_size is {g}"
                f", explore.kind {options.explore.kind}"
            )
        if compared.steps == "random" and compared.num_random_steps > k:
            problems.append(f"surrogate.num_random_steps: {compared.num_random_steps} of {k} steps")
        members = _num_members(options)
        if compared.weighting == "policy" and not 0 < compared.target_entropy < math.log(members):
            problems.append(
                f"surrogate.target_entropy: {compared.target_entropy} nats; {members} candidates allow 0 to "
                f"{math.log(members):.3f}"
            )
        if options.objective.kl_weight and options.objective.updates == 1:
            problems.append(
                f"objective.kl_weight: {options.objective.kl_weight} with objective.updates = 1; the first update is "
                "at the policy of the rollout, so that two or more were wanted"
            )
        if compared.share == "region" and (options.rollout.share == "none" or compared.anchor_mode != "replay"):
            problems.append(
                f"surrogate.share: region with rollout.share = {options.rollout.share} and surrogate.anchor_mode = "
                f"{compared.anchor_mode}; region and replay were wanted"
            )
        return problems

    @staticmethod
    def num_units(options: StepOptions) -> int:
        """With `integrate` P B; for each compared step P B with `replay`, and P where tokens are shared."""
        return _num_pairs(options) // pairs_of_unit(options)

    @staticmethod
    def num_evaluations(options: StepOptions) -> int:
        """With `replay` one a pair, with `integrate` the solver's, on the part of the path that is needed."""
        if options.surrogate.anchor_mode == "replay":
            return _num_pairs(options)
        path = SOLVERS[options.rollout.solver].evaluations(options.rollout.num_steps)
        needed = num_compared_steps(options) if options.surrogate.steps == "early" else len(path)
        return Neighbour.num_units(options) * sum(path[:needed])

    @staticmethod
    def num_forwards(options: StepOptions) -> int:
        """None: the old policy comes from the states of the rollout."""
        return 0

    def explore(self, key: PRNGKeyArray, prompts: Prompts, step: Int[Array, ""]) -> Exploration:
        """Initial noises of all groups (Eq. 6 or 10-11), anchors (Section 4.1) and compared steps."""
        group, num_prompts = self.options.rollout.group_size, prompts.region.shape[0]
        *key_noise, key_anchors, key_steps = jax.random.split(key, 4)
        noise = initial_noise(key_noise, prompts, self.networks, self.options)
        first = _first_perturbed(self.options)
        anchors = jax.vmap(lambda key: explore.sample_anchors(key, group, self.options.surrogate.anchors, first))(
            jax.random.split(key_anchors, num_prompts)
        )
        return Exploration(noise, anchors, self._compared_steps(key_steps))

    def _compared_steps(self, key: PRNGKeyArray) -> Int[Array, " T"]:
        steps, count = jnp.arange(1, self.options.rollout.num_steps + 1), num_compared_steps(self.options)
        match self.options.surrogate.steps:
            case "early":
                return steps[:count]
            case "random":
                return jnp.sort(jax.random.choice(key, steps, (count,), replace=False))
        return steps

    def rollout(
        self, velocity: VelocityWithAux, prompt: Prompts, candidate: Float[Array, "*g N C"]
    ) -> tuple[Float[Array, "K+1 *g N C"], Any]:
        """Integrates from the candidate's noise, or those of a group that shares tokens (Eq. 12)."""
        return rollout.integrate_with_aux(velocity, candidate, self.sigmas, self.solver)

    def units(self, exploration: Exploration) -> tuple[Int[Array, " U"], Int[Array, "U T"], Int[Array, "U T"]]:
        """Prompt of each unit, and anchor and step of each pair."""
        pairs = jnp.broadcast_arrays(exploration.anchors[:, :, None], exploration.steps[None, None])  # [P, B, S]
        if self._shares:
            pairs = [x.swapaxes(1, 2) for x in pairs]
        anchor, steps = (x.reshape(-1, pairs_of_unit(self.options)) for x in pairs)
        num_prompts = len(exploration.anchors)
        return jnp.repeat(jnp.arange(num_prompts), len(anchor) // num_prompts), anchor, steps

    def kept_shape(self) -> tuple[int, int, int]:
        """Of `log pi_old`: (units, pairs of a unit, G or with the source G + 1)."""
        return self.num_units(self.options), pairs_of_unit(self.options), _num_members(self.options)

    def read(self, states: Float[Array, "P G K+1 N C"], unit: tuple[Array, Array, Array]) -> StoredStates:
        """The states around the steps of the pairs."""
        prompt, anchor, steps = unit
        return StoredStates(
            before=states[prompt, anchor, steps - 1],
            after=states[prompt, anchor, steps],
            group=states[prompt, :, steps],
            start=states[prompt, anchor[0], 0],
            reference=states[prompt, 0, steps[0] - 1],
        )

    def loss(
        self,
        velocities: Velocities,
        prompt: Prompts,
        stored: StoredStates,
        unit: tuple[Array, Array, Array],
        advantages: Float[Array, " G"],
        log_old: Float[Array, "T M"],
        first: Bool[Array, ""],
    ) -> tuple[Float[Array, ""], Float[Array, "T M"], dict[str, Array]]:
        """`-J` of one unit (Eq. 5, 14, 15), its log-policy and metrics."""
        objective = self.options.objective
        log_pi, measured = self.log_policy(velocities, prompt, stored, unit)
        log_ratio, log_old = likelihood.log_ratio(log_pi, log_old, first)
        advantages = self._advantages(advantages)[None]
        gain = grpo.clipped_objective(log_ratio, advantages, objective.clip, self._weights(log_old))
        kl = grpo.categorical_kl(log_old, log_pi).mean()
        entropy = -(jnp.exp(log_old) * log_old).sum(-1).mean()
        measured |= likelihood.ratio_metrics(log_ratio, objective.clip) | {"kl": kl, "policy_entropy": entropy}
        return objective.kl_weight * kl - gain, log_pi, measured

    def log_policy(
        self, velocities: Velocities, prompt: Prompts, stored: StoredStates, unit: tuple[Array, Array, Array]
    ) -> tuple[Float[Array, "T M"], dict[str, Array]]:
        """`log pi_theta`: the softmax over members by their distance to the anchor under theta (Eq. 14); metrics."""
        settings, steps = self.options.surrogate, unit[2]
        before, anchor = self._anchor_states(velocities, stored, steps)
        members = self._members(prompt, stored.group, before, anchor, steps)
        distance = surrogate.distance_function(settings.distance, prompt.region, settings.tau_edit, settings.tau_base)
        temperature = 1.0
        if settings.weighting == "policy":
            old = self._members(prompt, stored.group, stored.before, stored.after, steps)
            distances = distance(old, stored.after[:, None])
            temperature = surrogate.calibrated_temperature(distances, settings.target_entropy)
        log_pi = surrogate.anchor_log_policy(anchor, members, distance, temperature)
        if not self.options.objective.source_advantage:
            return log_pi, {}
        return log_pi, {"source_distance": distance(anchor, members[:, -1]).mean()}

    def _anchor_states(
        self, velocities: Velocities, stored: StoredStates, steps: Int[Array, " T"]
    ) -> tuple[Float[Array, "T N C"], Float[Array, "T N C"]]:
        """`xbar_s^(k)` under theta, the only path that carries gradient (Eq. 13), before and after the given steps.

        `integrate` is the rollout's own solver, with its memory. `replay` is a step of Euler's from the stored state,
        whichever solver came there: beside a solver of higher order it does not end at the stored state after it.
        """
        if self._integrates:
            early = self.options.surrogate.steps == "early"
            sigmas = self.sigmas[: len(steps) + 1] if early else self.sigmas  # the later half would be thrown away
            states = rollout.integrate(jax.checkpoint(velocities.theta), stored.start, sigmas, self.solver)
            return states[steps - 1], states[steps]
        sigmas, k = jnp.asarray(self.sigmas), steps[0]
        if self._shares:
            v = velocities.shared(stored.reference, stored.before, sigmas[k - 1])
            return stored.before, move(stored.before, v, sigmas[k - 1], sigmas[k])
        return stored.before, euler_step(velocities.theta, stored.before[0], sigmas[k - 1], sigmas[k])[None]

    def _members(
        self, prompt: Prompts, group: Float[Array, "T G N C"], before: Array, after: Array, steps: Int[Array, " T"]
    ) -> Float[Array, "T M N C"]:
        """What the policy is over: the group after the given steps, and the source if it has an advantage (ours).

        Args:
            prompt: One row.
            group: The candidates.
            before, after: The anchor's states around each step, `[T, N, C]`.
            steps: Which.
        """
        if not self.options.objective.source_advantage:
            return group
        sigmas = jnp.asarray(self.sigmas)
        shrink = sigmas[steps] / sigmas[steps - 1]
        latents = self.networks.source(prompt.condition)
        source = surrogate.source_candidate(before, after, shrink, latents, prompt.region)
        return jnp.concatenate([group, source[:, None]], axis=1)

    def _advantages(self, advantages: Float[Array, " G"]) -> Float[Array, " M"]:
        """Those of the group, and the source's."""
        own = self.options.objective.source_advantage
        return jnp.append(advantages, own) if own else advantages

    def _weights(self, log_old: Float[Array, "T M"]) -> Float[Array, "T M"] | None:
        """Under pi_old, or 1 / G each: the source takes nothing from the others."""
        if self.options.surrogate.weighting == "policy":
            return jnp.exp(log_old)
        if self.options.objective.source_advantage:
            return jnp.full_like(log_old, 1 / self.options.rollout.group_size)
        return None

    @property
    def _integrates(self) -> bool:
        return self.options.surrogate.anchor_mode == "integrate"

    @property
    def _shares(self) -> bool:
        return self.options.surrogate.share != "none"

    def refresh(self, state: TrainState) -> TrainState:
        """As it is: the trained adapter rolls out."""
        return state


def num_compared_steps(options: StepOptions) -> int:
    """T, how many of the K solver steps carry the loss."""
    k = options.rollout.num_steps
    return {"all": k, "early": math.ceil(k / 2), "random": options.surrogate.num_random_steps}[options.surrogate.steps]


def pairs_of_unit(options: StepOptions) -> int:
    """T, how many pairs of an anchor and a solver step a unit has."""
    if options.surrogate.anchor_mode == "integrate":
        return num_compared_steps(options)
    return 1 if options.surrogate.share == "none" else options.surrogate.anchors


def _num_pairs(options: StepOptions) -> int:
    return options.rollout.prompts * options.surrogate.anchors * num_compared_steps(options)


def _first_perturbed(options: StepOptions) -> int:
    """The first candidate whose noise is perturbed: candidate 0 is the reference itself but in global exploration."""
    return 0 if options.explore.kind == "global" else 1


def _num_members(options: StepOptions) -> int:
    return options.rollout.group_size + bool(options.objective.source_advantage)
