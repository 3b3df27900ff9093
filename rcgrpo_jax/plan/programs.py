"""The training programs of a configuration, compiled for a topology: arguments are shapes with shardings, no data."""

from __future__ import annotations

import logging
import math
import re
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rcgrpo_jax.data.buckets import NONE as ONE_SIZE
from rcgrpo_jax.data.buckets import make_buckets
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.config import MMDiTConfig, VAEConfig
from rcgrpo_jax.models.quantization import NONE, is_quantized, quantize
from rcgrpo_jax.options import with_changes
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES, make_mesh
from rcgrpo_jax.parallel.sharding import parameter_sharding, replicated
from rcgrpo_jax.plan import flops
from rcgrpo_jax.plan.cost import Cost, count
from rcgrpo_jax.plan.rewards import reward_networks
from rcgrpo_jax.plan.topology import Topology
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.policy import POLICIES
from rcgrpo_jax.rl.programs import Programs
from rcgrpo_jax.runs.model import load_editor
from rcgrpo_jax.runs.state import init_state
from rcgrpo_jax.weights.networks import abstract_params
from rcgrpo_jax.weights.tokenizers import T5_LENGTH

logger = logging.getLogger(__name__)

FLUX_KONTEXT = "flux-kontext"  # the model.path that stands for the shapes of FLUX.1-Kontext-dev, without its files
NAMES = ("rollout", "decode", "update")
_UNITS = {"T": 2**40, "G": 2**30, "M": 2**20, "K": 2**10, "": 1}


class FluxKontextDev(FluxKontext):
    """What the folder of FLUX.1-Kontext-dev says of itself; there is none, and there are no weights."""

    max_text_tokens = T5_LENGTH

    def __init__(self):
        self.path = Path(FLUX_KONTEXT)

    def config(self, name: str) -> Any:
        return {"transformer": MMDiTConfig, "vae": VAEConfig}[name]()

    def schedule_options(self) -> dict[str, float]:
        return {}


def open_flux(path: str) -> FluxKontext:
    """The shapes of a folder of FLUX, or FLUX.1-Kontext-dev's for an empty path or `flux-kontext`.

    Raises:
        UserError: If it is a folder of another family: FLOPs are counted and encodings laid out as FLUX's.
    """
    return FluxKontextDev() if path in ("", FLUX_KONTEXT) else FluxKontext(path)


def at_largest(options: Options) -> Options:
    """A run whose pictures all have the largest size of its buckets: it needs at least the memory and time of any."""
    size = make_buckets(options.data.buckets, options.data.size).largest
    return with_changes(options, {"data.size": size, "data.buckets": ONE_SIZE})


@dataclass(frozen=True)
class Memory:
    """Bytes of HBM on a device while a program runs."""

    arguments: int
    temporaries: int  # with the program's own code
    outputs: int  # that are not written over arguments
    held: int  # what the run keeps besides: other programs' weights and state

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.held


@dataclass(frozen=True)
class Plan:
    """What the compiler says of one program."""

    name: str
    micro_batch: int  # samples at a time over the whole mesh
    needed: int  # bytes a device: the peak, or what the compiler asked for where it gave up
    available: int | None  # bytes a device; None if not known
    analytic: float  # FLOPs of a device, by formula
    memory: Memory | None = None  # None if it does not fit
    cost: Cost | None = None
    seconds: float = 0.0  # to compile

    @property
    def fits(self) -> bool:
        return self.memory is not None and (self.available is None or self.needed <= self.available)


class Workload:
    """The programs of a configuration on a topology, ready to be compiled.

    Args:
        options: The run's, validated for as many devices and for the model.
        model: Shapes of the model.
        topology: Devices.
        region: Share of the picture of a batch's largest region, where candidates share tokens outside of it.
    """

    def __init__(self, options: Options, model: FluxKontext, topology: Topology, region: float = flops.REGION):
        self.options, self.region = options, region
        self.mesh = make_mesh(vars(options.mesh), topology.devices)
        self.topology = topology._replace(devices=tuple(self.mesh.devices.flat))  # as the compiler numbers them
        editor = load_editor(options.model, model, self.mesh, options.acd.layers, options.acd.reference_keys)
        self.editor = editor
        self.programs = Programs(options.step, editor.networks, self.mesh)
        self.attention = editor.transformer.attention.implementation
        self.micro_batches = micro_batches(options)
        parts = counts(options)[0] // self.micro_batches["rollout"]
        self.calls = {"rollout": parts, "decode": parts, "update": 1}  # of a program in a step, or update
        self.model, self.rewards = model, reward_networks(options)
        target = math.prod(self.programs.grid)
        sizes = editor.transformer.config, editor.vae.config
        devices = math.prod(self.mesh.shape[axis] for axis in SAMPLE_AXES)
        text = editor.options.max_text_tokens
        total = flops.step(options, *sizes, text, target, self.attention, region, devices)
        self.own_tokens = flops.size_of_region(options, target, region)  # R; 0 if nothing is shared
        self.analytic = {name: value / self.mesh.size for name, value in total.items()}

    @cached_property
    def trees(self) -> dict[str, Any]:
        """Shapes and shardings of what a run keeps on the devices, by name."""
        known = [x for x in self.rewards.values() if not isinstance(x, UserError)]
        rewards = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=replicated(self.mesh)), known
        )
        trees = _trees(self.options, self.programs, self.editor, self.model)
        first = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0], 1, *x.shape[2:]), x.dtype, sharding=replicated(self.mesh)),
            trees["candidates"],
        )
        return trees | {"rewards": rewards, "shared": (first, self.own_tokens) if self.own_tokens else ()}

    def arguments(self, name: str) -> tuple:
        """Shapes, dtypes and shardings of a program's arguments, as `rl.trainer.Trainer` gives them."""
        t = SimpleNamespace(**self.trees)
        room = () if self.options.surrogate.share == "none" else (self.own_tokens,)
        return {
            "rollout": (t.params, t.state.rolling_out, t.prompts, t.candidates, *t.shared),
            "decode": (t.decoder, t.images),
            "update": (t.params, t.state, t.prompts, t.exploration, t.rollout, *t.objective, *room),
        }[name]

    def program(self, name: str) -> Any:
        """What `rl.trainer.Trainer` calls."""
        if name == "rollout" and self.own_tokens:
            return self.programs.rollout_shared
        return getattr(self.programs, name)

    def held(self, name: str) -> int:
        """Bytes a device of what lives while a program runs and is not among its arguments."""
        alive = {"params", "decoder", "state", "prompts", "exploration", "rewards"}
        alive |= {"rollout": {"earlier"}, "decode": {"earlier", "part"}, "update": {"upcoming"}}[name]
        used = {id(leaf) for leaf in jax.tree.leaves(self.arguments(name))}
        return sum(
            device_bytes(leaf)
            for tree in alive
            for leaf in jax.tree.leaves(self.trees[tree])
            if id(leaf) not in used
        )  # fmt: skip

    def compile(self, name: str) -> Plan:
        """Compiles one program and reads what it needs."""
        started, held = time.monotonic(), self.held(name)
        common = {"name": name, "micro_batch": self.micro_batches[name], "analytic": self.analytic[name]}
        try:
            with jax.set_mesh(self.mesh):
                compiled = self.program(name).lower(*self.arguments(name)).compile()
        except jax.errors.JaxRuntimeError as error:
            if not (refusal := parse_refusal(str(error))):
                raise
            needed, available = refusal
            return Plan(needed=needed + held, available=available, seconds=time.monotonic() - started, **common)
        found = compiled.memory_analysis()
        memory = Memory(
            found.argument_size_in_bytes,
            found.temp_size_in_bytes + found.generated_code_size_in_bytes,
            found.output_size_in_bytes - found.alias_size_in_bytes,
            held,
        )
        seconds = time.monotonic() - started
        return Plan(
            needed=memory.peak, available=self.topology.memory, memory=memory, cost=self.cost(name, compiled.as_text()),
            seconds=seconds, **common
        )  # fmt: skip

    def cost(self, name: str, program: str) -> Cost | None:
        """What a compiled program does in a step; None if it cannot be read, which loses no memory's figures."""
        cost = Cost()
        try:
            cost.add(count(program, self.topology.slices), self.calls[name])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # another form of XLA's text
            logger.warning("%s: the compiled program could not be read (%s: %s)", name, type(error).__name__, error)
            return None
        return cost


def micro_batches(options: Options) -> dict[str, int]:
    """Samples at a time over the whole mesh, by program."""
    samples, units = counts(options)
    rolled = options.rollout.micro_batch or samples
    return {
        "rollout": rolled,
        "decode": min(options.rollout.decode_micro_batch, rolled) or rolled,
        "update": options.surrogate.micro_batch or units,
    }


def counts(options: Options) -> tuple[int, int]:
    """Candidates that a step rolls out, and units that an update differentiates."""
    return options.rollout.prompts * options.rollout.group_size, POLICIES[options.policy].num_units(options.step)


def parse_refusal(message: str) -> tuple[int, int] | None:
    """(needed, available) bytes of XLA's out-of-memory error, or None if it is another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (
        r"\((\S+?)([TGMK]?)\) exceeds available HBM \((\S+?)([TGMK]?)\)",
        r"Used (\S+?)([TGMK]?) of (\S+?)([TGMK]?) hbm",
    ):
        if found := re.search(pattern, message):
            return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])
    return None


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def place(params: dict, mesh: Mesh, dtype: Any, quantization: str = NONE) -> dict:
    """Parameters as `weights.load` lays them on the mesh."""
    rule = parameter_sharding(mesh)

    def leaf(path: tuple[str, ...], x: jax.ShapeDtypeStruct) -> Any:
        kept = jax.ShapeDtypeStruct(x.shape, dtype)
        if is_quantized(path, quantization):
            kept = jax.eval_shape(partial(quantize, quantization=quantization), kept)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rule(path, x.shape)), kept)

    return unflatten_dict({path: leaf(path, x) for path, x in flatten_dict(params).items()})


def _trees(options: Options, programs: Programs, editor: FluxKontextEditor, model: FluxKontext) -> dict[str, Any]:
    """Shapes and shardings of all that a run keeps on the devices."""
    mesh = programs.mesh
    whole, dtype = replicated(mesh), jnp.dtype(options.model.dtype)

    def copied(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    base = model.param_shapes
    decoder = {"decoder": abstract_params("vae", model.config("vae"))["decoder"]}
    sizes, prompts, group = editor.transformer.config, options.rollout.prompts, options.rollout.group_size
    text = editor.options.max_text_tokens
    at_a_time = micro_batches(options)["rollout"] // prompts  # candidates of each group
    encoded = {
        "text": array((prompts, text, sizes.joint_attention_dim), dtype),
        "pooled": array((prompts, sizes.pooled_projection_dim), dtype),
        "reference": array((prompts, math.prod(programs.grid), sizes.in_channels)),
        "text_weights": array((prompts, text)),
    }
    mask = array((prompts, *options.data.size))
    with jax.set_mesh(mesh):
        adapter = (options.lora, options.optimizer, options.seed, base, POLICIES[options.policy].keeps_old)
        state = copied(jax.eval_shape(partial(init_state, *adapter)))
        asked = copied(jax.eval_shape(programs._prompts, encoded, mask))
        exploration = programs.explore.eval_shape(state.key, asked, state.step)
        params = place(base, mesh, dtype, options.model.quantization)
        started = jax.tree.map(lambda x: array((prompts, at_a_time, *x.shape[2:]), x.dtype), exploration.candidates)
        part = programs.rollout.eval_shape(params, state.rolling_out, asked, started)

    def candidates(count: int) -> Any:
        return jax.tree.map(lambda x: array((prompts, count, *x.shape[2:]), x.dtype), part)

    pictures = prompts * (group - at_a_time), *options.data.size, 3
    spread = NamedSharding(mesh, PartitionSpec(SAMPLE_AXES))
    return {
        "params": params,
        "decoder": place(decoder, mesh, dtype),
        "state": state,
        "prompts": asked,
        "upcoming": copied(asked),  # of the next step
        "exploration": exploration,
        "candidates": started,
        "part": part,
        "rollout": candidates(group),
        "images": array((prompts, at_a_time, *part.states.shape[3:])),
        "earlier": (
            (candidates(group - at_a_time), jax.ShapeDtypeStruct(pictures, jnp.float32, sharding=spread))
            if at_a_time < group
            else ()
        ),
        "objective": (array((prompts, group)), array(programs.policy.kept_shape()), array((), bool)),
    }
