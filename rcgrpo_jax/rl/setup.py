"""What a run is put together from, made once of its configuration, and whether its parts go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rcgrpo_jax import rewards as reward_registry
from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.data.buckets import make_buckets
from rcgrpo_jax.data.example import Needs, check_needs
from rcgrpo_jax.editors.model import Editor, Model
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.encoding.batches import Batches
from rcgrpo_jax.encoding.cache import EncodedSource
from rcgrpo_jax.encoding.encode import encode
from rcgrpo_jax.encoding.index import KnownExample
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.models.attention import choose
from rcgrpo_jax.models.lora import target_kernels
from rcgrpo_jax.options import DataOptions, read_options
from rcgrpo_jax.parallel.mesh import check_parts, make_mesh
from rcgrpo_jax.parallel.sharding import replicated
from rcgrpo_jax.rewards import Reward
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.policy import POLICIES
from rcgrpo_jax.rl.reward_fields import names_in
from rcgrpo_jax.runs.model import load_editor
from rcgrpo_jax.runs.sizes import candidate_bytes, check_lora, check_picture, check_tokens
from rcgrpo_jax.runs.state import TrainState, init_state, start_lora

MOST_SAMPLES = 8  # of `train.samples` that are edited


@dataclass(frozen=True)
class Setup:
    """What a configuration stands for, checked before any weight is read."""

    options: Options
    mesh: Mesh
    model: Model
    rewards: Mapping[str, Reward]  # those that have a weight, and the watched

    def encode(self, workdir: Path) -> Batches:
        """The data through the encoders, in the cache of a run in `workdir`."""
        return self._encode(self.options.data, workdir)

    def encode_samples(self, workdir: Path) -> EncodedSource | None:
        """The first examples of `train.samples` through the encoders, in the same cache; None if there are none."""
        if not self.options.train.samples:
            return None
        data = replace(self.options.data, path=self.options.train.samples)
        return self._encode(data, workdir, first=MOST_SAMPLES).source

    def _encode(self, data: DataOptions, workdir: Path, first: int = 0) -> Batches:
        check, options = partial(check_scorable, self.rewards), self.options
        where = (data, options.model, self.model, workdir, self.mesh)
        captions = any(reward.needs_caption for reward in self.rewards.values())
        return encode(*where, options.rollout.prompts, options.seed, check, captions=captions, first=first)

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of the parts, beside the configuration."""
        learned = {name: reward for name, reward in self.rewards.items() if self.options.rewards.get(name)}
        judges = {name: described for name, reward in learned.items() if (described := reward.describe())}
        return {"model_digest": self.model.trained_fingerprint()} | ({"judges": judges} if judges else {})

    def load_editor(self) -> Editor:
        """The model on the mesh."""
        acd = self.options.acd
        return load_editor(self.options.model, self.model, self.mesh, acd.layers, acd.reference_keys)

    def fresh_state(self) -> TrainState:
        """The state of an adapter that does nothing, on every device."""
        return fresh_state(self.options, self.model, self.mesh)

    def initial_state(self) -> TrainState:
        """The state before the first step, with the LoRA of `lora.init` if there is one.

        Raises:
            UserError: If that LoRA cannot be read, or does not fit.
        """
        return start_lora(self.fresh_state(), self.options.lora, self.model.param_shapes, self.mesh)


def set_up(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Checks a configuration and makes its parts.

    Args:
        config: As `rl.config.default_config` lays it out.
        devices: Of the mesh; all by default.

    Raises:
        UserError: For every mistake in the configuration, and in it and the model together.
    """
    devices = jax.devices() if devices is None else list(devices)
    validate(config, len(devices))
    options = read_options(Options, config)
    mesh, model = make_mesh(vars(options.mesh), devices), open_model(options.model.path)
    setup = Setup(options, mesh, model, make_rewards(options))
    check_mesh(options, mesh, model.sizes.num_heads)
    check_model_fits(options, model)
    check_sizes(options, model)
    return setup


# Fields that say how a run is spread over its machines: whoever encodes for it may have others.
_ANYWHERE = {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 1, "rollout.micro_batch": 0,
             "rollout.decode_micro_batch": 0, "surrogate.micro_batch": 0}  # fmt: skip


def encode_ahead(config: ConfigDict, workdir: Path) -> list[EncodedSource]:
    """Fills the cache of a run that is still to come; the weights of its transformer are not read.

    Mesh and micro-batches are those of the machines that will train, and count for nothing here.

    Args:
        config: Of the run.
        workdir: Its directory, which has the cache unless `data.cache` says where.

    Returns:
        Its examples, and its held-out samples if it has some.

    Raises:
        UserError: For every mistake in the configuration, the model and the data.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(_ANYWHERE)
    validate(config, 1)
    options = read_options(Options, config)
    mesh, model = make_mesh(vars(options.mesh)), open_model(options.model.path)
    check_model_fits(options, model)
    check_sizes(options, model)
    setup = Setup(options, mesh, model, make_rewards(options))
    with jax.set_mesh(mesh):
        sources = [setup.encode_samples(workdir), setup.encode(workdir).source]
    return [source for source in reversed(sources) if source is not None]


def make_rewards(options: Options) -> dict[str, Reward]:
    """The rewards that have a weight, and the watched, by name.

    Raises:
        UserError: One cannot be made, or a plug-in does not score random pictures.
    """
    known = reward_registry.known_rewards(options.plugins)
    names = [*(name for name, weight in options.rewards.items() if weight), *names_in(options.watch)]
    rewards = {name: reward_registry.make(name, known, **options.reward_options.get(name, {})) for name in names}
    for name in (name for name, reward in rewards.items() if reward.needs_task):
        raise UsageError(
            f"rewards.{name}: it rates by the kind of edit, which a training does not know.",
            "Leave it out; `rcgrpo evaluate --benchmark` and `rcgrpo judge` take it.",
        )
    for name in options.plugins.keys() & rewards.keys():
        reward_registry.try_reward(name, rewards[name], make_buckets(options.data.buckets, options.data.size).largest)
    return rewards


def fresh_state(options: Options, model: Model, mesh: Mesh) -> TrainState:
    """The state of an adapter that does nothing, on every device."""
    shapes = model.param_shapes

    def initial() -> TrainState:
        keep_old = POLICIES[options.policy].keeps_old
        return init_state(options.lora, options.optimizer, options.seed, shapes, keep_old)

    return jax.jit(initial, out_shardings=replicated(mesh))()


def check_mesh(options: Options, mesh: Mesh, num_heads: int) -> None:
    """Refuses a mesh that splits a group over processes, and what `check_parts` and `attention.choose` refuse."""
    count = len({device.process_index for device in mesh.devices.flat})
    if options.rollout.prompts % count:
        raise UsageError(
            f"config: rollout.prompts: {options.rollout.prompts}; each of {count} processes scores whole groups.",
            f"Choose a multiple of {count}.",
        )
    check_parts(mesh, num_heads)
    choose(options.model.attention, mesh.devices.flat[0].platform, options.model.dtype)


def check_model_fits(options: Options, model: Model) -> None:
    """Refuses settings that the model at hand cannot serve, before any weight is read."""
    sizes = model.sizes
    if options.acd.weight and options.acd.layers > sizes.num_blocks:
        raise UsageError(
            f"config: acd.layers: {options.acd.layers}; the model has {sizes.num_blocks} blocks.", "Lower acd.layers."
        )
    if options.rollout.share != "none" and not sizes.shares_tokens:
        raise UsageError(
            f"config: rollout.share: {options.rollout.share}; candidates of this model cannot share tokens.",
            "Set rollout.share=none.",
        )
    check_tokens(options.data, sizes.token_pixels)
    target_kernels(model.param_shapes, options.lora.targets)


def check_sizes(options: Options, model: Model) -> None:
    """Refuses post-training whose groups or LoRA are larger than the memory of all that takes part.

    Raises:
        UserError: With the field that asks for it.
    """
    size, rollout = make_buckets(options.data.buckets, options.data.size).largest, options.rollout
    check_picture(size, model)
    check_memory(
        f"rollout: {rollout.prompts} prompts x {rollout.group_size} candidates of {rollout.num_steps} steps",
        rollout.prompts * rollout.group_size * candidate_bytes(size, model, rollout.num_steps),
        "Lower rollout.prompts, rollout.group_size, rollout.num_steps or data.size.",
    )
    copies = bool(options.optimizer.ema_decay) + POLICIES[options.policy].keeps_old
    check_lora(options.lora, copies, model)


def check_scorable(rewards: Mapping[str, Reward], example: KnownExample) -> None:
    """Refuses an example that a reward cannot score."""
    for name, reward in rewards.items():
        reward.validate(example.instruction)
        who = f"the reward {name!r}"
        check_needs(example, Needs(right_target=who * reward.needs_target, caption=who * reward.needs_caption))
