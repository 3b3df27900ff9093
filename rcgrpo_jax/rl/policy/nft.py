"""DiffusionNFT: samples of an old adapter are matched at random times, towards the good ones and away from the bad."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.flow import rollout
from rcgrpo_jax.flow.matching import interpolate
from rcgrpo_jax.flow.solvers import SOLVERS
from rcgrpo_jax.flow.solvers.base import VelocityWithAux
from rcgrpo_jax.method import nft
from rcgrpo_jax.rl.options import StepOptions
from rcgrpo_jax.rl.policy.base import SHARING, Prompts, Velocities
from rcgrpo_jax.rl.policy.noise import initial_noise
from rcgrpo_jax.runs.state import TrainState


class Exploration(NamedTuple):
    """The random choices of one step."""

    noise: Float[Array, "P G N C"]  # initial noises
    times: Int[Array, "P G T"]  # which of s_0, ..., s_{K-1} each sample is noised to, all different
    keys: PRNGKeyArray  # [P, G, T], of the noise eps there

    @property
    def candidates(self) -> Float[Array, "P G N C"]:
        """The noises: a rollout is deterministic."""
        return self.noise


class NFT:
    """A candidate's sample is matched at some times of the rollout (`method.nft`).

    A unit is (prompt, candidate, time). Candidates with A = 0 are left out: their loss would hold the adapter to the
    old one, and those without a score have A = 0 too.
    """

    OWN = ("nft", *SHARING)
    keeps_old = True

    def __init__(self, options: StepOptions, networks: Networks, sigmas: Float[Array, " K+1"]):
        self.options, self.networks, self.sigmas = options, networks, sigmas
        self.grid = networks.grid(*options.size)

    @staticmethod
    def problems(options: StepOptions) -> list[str]:
        """As `Policy.problems`."""
        problems, k, fraction = [], options.rollout.num_steps, options.nft.time_fraction
        if not num_times(options):
            problems.append(
                f"nft.time_fraction: {fraction} of rollout.num_steps = {k} leaves no time; 1 / {k} or more was wanted"
            )
        if options.objective.kl_weight:
            problems.append(
                f"objective.kl_weight: {options.objective.kl_weight} with policy = nft, which has no likelihood; 0 was "
                "wanted, and nft.base_weight for the pull to the model without an adapter"
            )
        return problems

    @staticmethod
    def num_units(options: StepOptions) -> int:
        """P G T."""
        return options.rollout.prompts * options.rollout.group_size * num_times(options)

    @staticmethod
    def num_evaluations(options: StepOptions) -> int:
        """One a unit."""
        return NFT.num_units(options)

    @staticmethod
    def num_forwards(options: StepOptions) -> int:
        """That of the old adapter, and that of the base if there is a pull to it, for each unit."""
        return NFT.num_units(options) * (2 if options.nft.base_weight else 1)

    def explore(self, key: PRNGKeyArray, prompts: Prompts, step: Int[Array, ""]) -> Exploration:
        """Initial noises of all groups, and for each candidate the times and noises that it is matched at."""
        *key_noise, key_times, key_matched = jax.random.split(key, 4)
        noise = initial_noise(key_noise, prompts, self.networks, self.options)
        every = jnp.arange(self.options.rollout.num_steps)
        every = jnp.broadcast_to(every, (*noise.shape[:2], len(every)))
        times = jax.random.permutation(key_times, every, -1, independent=True)[..., : num_times(self.options)]
        return Exploration(noise, times, jax.random.split(key_matched, times.shape))

    def rollout(
        self, velocity: VelocityWithAux, prompt: Prompts, candidate: Float[Array, "*g N C"]
    ) -> tuple[Float[Array, "K+1 *g N C"], Any]:
        """Integrates from the noise of a candidate, or of a group that shares tokens; the last state is the sample."""
        solver = SOLVERS[self.options.rollout.solver]
        return rollout.integrate_with_aux(velocity, candidate, self.sigmas, solver)

    def units(self, exploration: Exploration) -> tuple[Int[Array, " U"], Int[Array, " U"], Int[Array, " U"], Array]:
        """Prompt, candidate, time and key of each unit."""
        shape = exploration.times.shape
        prompt, candidate, _ = (x.reshape(-1) for x in jnp.indices(shape))
        return prompt, candidate, exploration.times.reshape(-1), exploration.keys.reshape(-1)

    def kept_shape(self) -> tuple[int]:
        """Nothing is kept; zeros stand for it."""
        return (self.num_units(self.options),)

    def read(self, states: Float[Array, "P G K+1 N C"], unit: tuple[Array, ...]) -> Float[Array, "N C"]:
        """The candidate's sample."""
        return states[unit[0], unit[1], -1]

    def loss(
        self,
        velocities: Velocities,
        prompt: Prompts,
        data: Float[Array, "N C"],
        unit: tuple[Array, Array, Array, Array],
        advantages: Float[Array, " G"],
        kept: Float[Array, ""],
        first: Bool[Array, ""],
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
        """Of a sample at one time: the matching losses, the penalty by region, and the pull to the base."""
        _, candidate, time, key = unit
        settings, clip = self.options.nft, self.options.objective.advantage_clip
        advantage, sigma = advantages[candidate], jnp.asarray(self.sigmas, jnp.float32)[time]
        x, _ = interpolate(data, jax.random.normal(key, data.shape, jnp.float32), sigma)
        v, v_old = velocities.theta(x, sigma), jax.lax.stop_gradient(velocities.old(x, sigma))
        positive, negative = nft.implied_data(v, v_old, x, sigma, settings.beta)
        r = nft.optimality(advantage, clip)
        loss = nft.matching_loss(positive, negative, data, r, settings.beta, clip)
        metrics = {"from_old": jnp.square(v - v_old).mean()}
        if settings.keep_weight or settings.change_weight:
            penalty = self._region_penalty(positive, negative, data, prompt, r)
            loss, metrics["region_penalty"] = loss + penalty, penalty
        if settings.base_weight:
            from_base = jnp.square(v - jax.lax.stop_gradient(velocities.base(x, sigma))).mean()
            loss, metrics["from_base"] = loss + settings.base_weight * from_base, from_base
        return jnp.where(advantage != 0, loss, 0.0), kept, metrics

    def _region_penalty(
        self,
        positive: Float[Array, "N C"],
        negative: Float[Array, "N C"],
        data: Float[Array, "N C"],
        prompt: Prompts,
        r: Float[Array, ""],
    ) -> Float[Array, ""]:
        """`nft.region_penalty` with the settings of the run."""
        settings, source = self.options.nft, self.networks.source(prompt.condition)
        return nft.region_penalty(
            positive,
            negative,
            source if settings.keep_to == "source" else data,
            source,
            nft.region_weights(prompt.region, self.grid, settings.erosion, settings.ring_weight),
            r,
            keep_weight=settings.keep_weight,
            tolerance=settings.keep_tolerance,
            change_weight=settings.change_weight,
            margin=settings.change_margin,
        )

    def refresh(self, state: TrainState) -> TrainState:
        """The old adapter moves towards the trained one, by as much as the updates so far let it."""
        d = nft.decay(self.options.nft.decay, state.num_updates)
        return state.replace(old=optax.incremental_update(state.params, state.old, 1.0 - d))


def num_times(options: StepOptions) -> int:
    """T, how many of a rollout's K times each candidate is matched at; the published code cuts off, too."""
    return int(options.rollout.num_steps * options.nft.time_fraction)
