"""The programs of one training step: prepare the prompts, explore, roll out, decode, update.

The mathematics is in `method` and `flow`, what is random and compared in the policy; here they meet the model, the mesh
and the optimizer. Samples are (prompt, candidate) pairs in the rollout and the policy's units in the update, both
flattened to one axis that is vmapped and spread over the mesh in micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from rcgrpo_jax.editors.base import Networks, velocity_and_density
from rcgrpo_jax.encoding.batches import EditBatch
from rcgrpo_jax.flow.solvers.base import Velocity, VelocityWithAux
from rcgrpo_jax.method import concentration, region, sharing
from rcgrpo_jax.models.lora import scale_adapter
from rcgrpo_jax.parallel.distributed import rows_to_mesh
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES
from rcgrpo_jax.parallel.microbatch import accumulate, map_samples
from rcgrpo_jax.parallel.sharding import replicated
from rcgrpo_jax.rl.options import StepOptions
from rcgrpo_jax.rl.parts import split_groups
from rcgrpo_jax.rl.policy import POLICIES
from rcgrpo_jax.rl.policy.base import Exploration, Prompts, Rollout, Velocities
from rcgrpo_jax.runs.state import TrainState, apply_gradients


class Programs:
    """The compiled programs of a run, for pictures of one size.

    Pictures of another size need others, also where all arrays have the same shapes, as those of an upright picture and
    of the same picture on its side: the token grid gives the positions, and with the schedule it is part of a program.

    Args:
        options: Validated.
        networks: The networks; parameters are arguments.
        mesh: The mesh; the programs must be called under `jax.set_mesh(mesh)`.
    """

    def __init__(self, options: StepOptions, networks: Networks, mesh: Mesh):
        self.options, self.networks, self.mesh = options, networks, mesh
        self.grid = networks.grid(*options.size)
        self.sigmas = networks.sigmas(options.rollout.num_steps, self.grid[0] * self.grid[1])
        self.policy = POLICIES[options.policy](options, networks, self.sigmas)
        whole = replicated(mesh)
        self.gather_prompts = jax.jit(self._prompts, out_shardings=whole)
        self.explore = jax.jit(self.policy.explore, out_shardings=whole)
        self.rollout = jax.jit(self._rollout, out_shardings=whole)
        self.rollout_shared = jax.jit(self._rollout_shared, static_argnames="size", out_shardings=whole)
        self.count_own = jax.jit(self._count_own, out_shardings=whole)
        self.decode = jax.jit(self._decode, out_shardings=NamedSharding(mesh, PartitionSpec(SAMPLE_AXES)))
        self.update = jax.jit(self._update, static_argnames="size", out_shardings=whole, donate_argnums=1)
        self.refresh = jax.jit(self.policy.refresh, out_shardings=whole, donate_argnums=0)

    def prompts(self, batch: EditBatch) -> Prompts:
        """The rows of all processes, on every device; does not wait for them."""
        return self.gather_prompts(*rows_to_mesh((batch.encoded, batch.mask), self.mesh))

    def _prompts(self, encoded: Mapping[str, Array], mask: Float[Array, "P H W"]) -> Prompts:
        """A batch with its masks on the token grid."""
        threshold = self.options.explore.mask_threshold or None

        def tokens(dilation: int) -> Array:
            return jax.vmap(partial(region.token_region, grid=self.grid, dilation=dilation, threshold=threshold))(mask)

        condition = self.networks.condition(encoded, self.options.guidance)
        text_weights = self.networks.text_weights(encoded)
        return Prompts(condition, text_weights, tokens(0), tokens(self.options.explore.mask_dilation))

    def _velocity(self, params: dict, lora: dict, condition: Any) -> Velocity:
        """`v_theta(., ., c)` of one sample."""
        return lambda x, sigma: self.networks.velocity(params, lora, x, sigma, condition, self.grid)[0]

    def room(self, prompts: Prompts) -> int:
        """R, for the tokens that candidates have of their own; 0 if all are. It waits for the masks."""
        if self.options.rollout.share == "none":
            return 0
        return sharing.choose_size(int(self.count_own(prompts)), math.prod(self.grid))

    def roll_out(
        self, params: dict, lora: dict, prompts: Prompts, exploration: Exploration, at_a_time: int, size: int
    ) -> Iterator[Rollout]:
        """Rolls out so many candidates of each group at a time, with `room` for their own tokens."""
        for part in split_groups(exploration.candidates, at_a_time):
            if size:
                first = exploration.candidates[:, :1]
                yield self.rollout_shared(params, lora, prompts, part, first, size=size)
            else:
                yield self.rollout(params, lora, prompts, part)

    def _rollout(self, params: dict, lora: dict, prompts: Prompts, candidates: Any) -> Rollout:
        """Rolls out candidates of every group, `[P, g, ...]`, and takes R_acd (Eq. 18)."""
        lora = scale_adapter(lora, self.options.lora_scale)
        num_prompts, group = jax.tree.leaves(candidates)[0].shape[:2]

        def one(index: Array, candidate: Any) -> tuple[Array, Array]:
            prompt = _row(prompts, index)
            states, densities = self.policy.rollout(self._rolling_velocity(params, lora, prompt), prompt, candidate)
            return states, jnp.zeros(()) if densities is None else concentration.reward(densities)

        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), candidates)
        states, acd = map_samples(one, (jnp.repeat(jnp.arange(num_prompts), group), flat), 0, self.mesh)
        return Rollout(states.reshape(num_prompts, group, *states.shape[1:]), acd.reshape(num_prompts, group))

    def _rolling_velocity(
        self, params: dict, lora: dict, prompt: Prompts, own: sharing.Own | None = None
    ) -> VelocityWithAux:
        """That of one sample, or of a group that shares tokens, beside its ACD where that is a reward."""
        if not self.options.acd.weight:
            where = (prompt.condition, self.grid, None, own)
            return lambda x, sigma: (self.networks.velocity(params, lora, x, sigma, *where)[0], None)
        text_weights = prompt.text_weights if self.options.acd.text == "instruction" else None
        where = (prompt.condition, self.grid, prompt.region, text_weights, own)
        return velocity_and_density(self.networks, params, lora, *where)

    def own_tokens(self, prompt: Prompts) -> tuple[Bool[Array, " N"], Bool[Array, " N"]]:
        """Those of target and source image, of one row."""
        settings = self.options.rollout
        return sharing.own_tokens(prompt.explored, self.grid, settings.share_grow, settings.share_grow_reference)

    def _count_own(self, prompts: Prompts) -> Array:
        """Tokens of the largest set of the batch."""
        target, reference = jax.vmap(self.own_tokens)(prompts)
        return (target.sum(-1) + reference.sum(-1)).max()

    def _rollout_shared(
        self,
        params: dict,
        lora: dict,
        prompts: Prompts,
        candidates: Float[Array, "P g N C"],
        first: Float[Array, "P 1 N C"],
        size: int,
    ) -> Rollout:
        """As `_rollout`, with the first candidate's tokens outside the region (`method.sharing`).

        A sample is a prompt with a part of its group: as few parts as spread over the mesh, each with a pass of the
        first candidate. If a group is whole, that pass is candidate 0.

        Args:
            params, lora, prompts: As there.
            candidates: Initial noises.
            first: That of candidate 0.
            size: R, room for a candidate's own tokens.
        """
        lora = scale_adapter(lora, self.options.lora_scale)
        num_prompts, group = candidates.shape[:2]
        num_parts = sharing.parts_of_group(num_prompts, math.prod(self.mesh.shape[axis] for axis in SAMPLE_AXES))
        is_whole = num_parts == 1 and group == self.options.rollout.group_size
        if not is_whole:
            candidates = jnp.concatenate(
                [jnp.repeat(first, num_parts, 0), candidates.reshape(num_prompts * num_parts, -1, *first.shape[2:])], 1
            )

        def one(index: Array, noises: Float[Array, "g N C"]) -> tuple[Array, Array]:
            prompt = _row(prompts, index)
            own = sharing.Own(*self.own_tokens(prompt), size)
            shared = self._rolling_velocity(params, lora, prompt, own)
            full = jax.vmap(self._rolling_velocity(params, lora, prompt), (0, None), (0, -1))
            velocity = in_full_first(full, shared, self.sigmas, self.options.rollout.share_full_steps)
            states, densities = self.policy.rollout(velocity, prompt, noises)
            acd = jnp.zeros(len(noises)) if densities is None else concentration.reward(jnp.moveaxis(densities, -1, 0))
            return (states.swapaxes(0, 1), acd) if is_whole else (states.swapaxes(0, 1)[1:], acd[1:])

        which = jnp.repeat(jnp.arange(num_prompts), num_parts)
        states, acd = map_samples(one, (which, candidates), 0, self.mesh)
        return Rollout(states.reshape(num_prompts, group, *states.shape[2:]), acd.reshape(num_prompts, group))

    def _decode(self, params: dict, tokens: Float[Array, "P g N C"]) -> Float[Array, "Pg H W 3"]:
        """Pictures of final states, in [0, 1] or NaN, each on the device that rolled it out."""
        images = map_samples(
            lambda x: self.networks.decode(params, x, self.grid),
            (tokens.reshape(-1, *tokens.shape[2:]),),
            min(self.options.rollout.decode_micro_batch, math.prod(tokens.shape[:2])),
            self.mesh,
        )
        return jnp.where(jnp.isfinite(images), jnp.clip(images / 2 + 0.5, 0, 1), jnp.nan)

    def _unit_loss(
        self,
        lora: dict,
        old: dict | None,
        params: dict,
        prompts: Prompts,
        states: Float[Array, "P G K+1 N C"],
        advantages: Float[Array, "P G"],
        unit: tuple[Array, ...],
        kept: Array,
        first: Array,
        size: int,
    ) -> tuple[Array, tuple[Array, dict]]:
        """What the policy minimises in one unit, 0 if its group teaches nothing; what is kept of it, and metrics."""
        of_group = advantages[unit[0]]
        teaches = jnp.any(of_group != 0)  # dropped groups and those of equal rewards do not

        def finite(x: Array) -> Array:
            # Before the loss, not only around it: the gradient of what has diverged is zero times NaN, which is NaN.
            return jnp.where(teaches, x, 0)

        def velocity(adapter: dict) -> Velocity:
            return self._velocity(params, scale_adapter(adapter, self.options.lora_scale), prompt.condition)

        prompt, stored = jax.tree.map(finite, (_row(prompts, unit[0]), self.policy.read(states, unit)))

        def shared(first: Float[Array, "N C"], others: Float[Array, "g N C"], sigma: Array) -> Array:
            if not size:
                return jax.vmap(velocity(lora), (0, None))(others, sigma)
            group, own = jnp.concatenate([first[None], others]), sharing.Own(*self.own_tokens(prompt), size)
            scaled = scale_adapter(lora, self.options.lora_scale)
            return self.networks.velocity(params, scaled, group, sigma, prompt.condition, self.grid, None, own)[0][1:]

        velocities = Velocities(velocity(lora), None if old is None else velocity(old), velocity({}), shared)
        loss, kept, metrics = self.policy.loss(velocities, prompt, stored, unit, of_group, kept, first)
        return jnp.where(teaches, loss, 0.0), (kept, metrics)

    def _update(
        self,
        params: dict,
        state: TrainState,
        prompts: Prompts,
        exploration: Exploration,
        rollout: Rollout,
        advantages: Float[Array, "P G"],
        kept: Float[Array, "U ..."],
        first: Array,
        size: int = 0,
    ) -> tuple[TrainState, Float[Array, "U ..."], dict]:
        """One optimizer update on a rollout.

        Args:
            params: Frozen base.
            state: Donated.
            prompts, exploration, rollout: The step's data.
            advantages: `[P, G]`.
            kept: What the first update kept, such as its log-policy; ignored in the first.
            first: Whether this is the first update after the rollout.
            size: R, room for a candidate's own tokens, where the update shares others; 0: all are its own.

        Returns:
            The new state, what this update keeps, and metrics.
        """

        def chunk_loss(lora: dict, *chunk: Array) -> tuple[Array, tuple]:
            def one(*row: Array) -> tuple[Array, tuple]:
                *unit, kept = row
                groups = (params, prompts, rollout.states, advantages)
                return self._unit_loss(lora, state.old, *groups, tuple(unit), kept, first, size)

            losses, aux = jax.vmap(one, spmd_axis_name=SAMPLE_AXES)(*chunk)
            return losses.mean(), (losses, *aux)

        def gradients(*chunk: Array) -> tuple[dict, tuple]:
            return jax.grad(chunk_loss, has_aux=True)(state.params, *chunk)

        units = (*self.policy.units(exploration), kept)
        grads, (losses, kept, metrics) = accumulate(gradients, units, self.options.surrogate.micro_batch, self.mesh)
        updated = apply_gradients(state, grads, self.options.optimizer)
        teaches = jnp.any(advantages != 0, axis=-1)[units[0]]  # [U]
        learned = teaches.any()  # else momentum and weight decay would move the adapter all the same
        state = jax.tree.map(partial(jnp.where, learned), updated, state)
        scalars = {name: jnp.mean(x, where=teaches) for name, x in metrics.items()}  # NaN if nothing teaches
        largest = {name: jnp.max(x, where=teaches, initial=0.0) for name, x in metrics.items() if _is_largest(name)}
        scalars |= largest | {"loss": losses.mean(), "grad_norm": optax.tree.norm(grads)}
        return state, kept, scalars


@lru_cache(maxsize=32)  # more than the variants of an ablation, which takes them in turn
def shared_programs(options: StepOptions, networks: Networks, mesh: Mesh) -> Programs:
    """`Programs`; runs that are equal in these, such as the seeds of an ablation, share one compilation."""
    return Programs(options, networks, mesh)


class ProgramsBySize:
    """The programs of a run by the size of pictures, made once for each.

    It keeps those that it has given, whatever room other runs leave in `shared_programs`.

    Args:
        options: The run's.
        networks: The networks.
        mesh: The mesh.
    """

    def __init__(self, options: StepOptions, networks: Networks, mesh: Mesh):
        self._options, self._where, self._given = options, (networks, mesh), {}

    def __call__(self, size: tuple[int, int]) -> Programs:
        """The programs for pictures of (height, width)."""
        if size not in self._given:
            self._given[size] = shared_programs(replace(self._options, size=size), *self._where)
        return self._given[size]


def in_full_first(
    full: VelocityWithAux, shared: VelocityWithAux, sigmas: Float[Array, " K+1"], num_steps: int
) -> VelocityWithAux:
    """The one velocity in the first steps, and then the other; what is not chosen is not computed."""
    if not num_steps:
        return shared
    return lambda x, sigma: jax.lax.cond(sigma > sigmas[num_steps], full, shared, x, sigma)


def _is_largest(metric: str) -> bool:
    """Whether a metric of the units is the largest of them, and not their mean."""
    return metric.endswith("_deviation")


def _row(prompts: Prompts, index: Array) -> Prompts:
    return jax.tree.map(lambda x: x[index], prompts)
