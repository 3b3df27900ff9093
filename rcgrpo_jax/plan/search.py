"""Settings that fit, the fastest by arithmetic first: mesh shapes, micro-batches and remat policies.

Arithmetic orders the settings and drops those that cannot fit; the compiler has the last word on each that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from rcgrpo_jax.editors.flux_kontext import FluxKontext
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.flow.solvers import num_evaluations
from rcgrpo_jax.models.attention import choose
from rcgrpo_jax.models.mmdit import REMAT_POLICIES
from rcgrpo_jax.options import with_changes
from rcgrpo_jax.parallel.mesh import AXES, make_mesh
from rcgrpo_jax.plan import flops
from rcgrpo_jax.plan.chips import Chip
from rcgrpo_jax.plan.programs import NAMES, Plan, Workload, counts, device_bytes, micro_batches, place
from rcgrpo_jax.plan.roofline import Time, roofline
from rcgrpo_jax.plan.topology import Topology
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.setup import check_mesh
from rcgrpo_jax.runs.fields import quantization_problems

MICRO_BATCH = {
    "rollout": "rollout.micro_batch",
    "decode": "rollout.decode_micro_batch",
    "update": "surrogate.micro_batch",
}
_UNKNOWN = Chip("unknown", "", flops=1e12, hbm_bandwidth=math.inf, ici=math.inf, dcn=math.inf)  # ranks by FLOPs alone
Shape = tuple[int, int, int]  # devices along data, fsdp and tensor


class Setting(NamedTuple):
    """What one program may be run with."""

    changes: dict[str, Any]  # field of the configuration -> value
    micro_batch: int
    seconds: float  # at least, by arithmetic
    needed: float  # bytes a device, at least


class FittingSettings(NamedTuple):
    """Settings under which all programs fit."""

    changes: dict[str, Any]
    plans: list[Plan]
    seconds: float  # of a step on the roofline


def step_seconds(options: Options, plans: list[Plan], chip: Chip | None) -> float:
    """Roofline of a whole step: rollout, decode and all updates, one after another; infinite if one is unreadable."""
    if not all(plan.cost for plan in plans):
        return math.inf
    times = {plan.name: roofline(plan.cost, chip or _UNKNOWN).seconds for plan in plans}
    return times["rollout"] + times["decode"] + options.objective.updates * times["update"]


class Search:
    """Tries settings of a configuration on a topology.

    Args:
        options: The run's, valid but for its mesh and micro-batches.
        model: Shapes of the model.
        topology: Devices.
        limit: Programs to compile at most.
        say: Called with a line after each.
        region: As for `Workload`.
    """

    def __init__(
        self,
        options: Options,
        model: FluxKontext,
        topology: Topology,
        limit: int,
        say: Callable[[str], None] = lambda _: None,
        region: float = flops.REGION,
    ):
        self.options, self.model, self.topology, self.limit, self.say = options, model, topology, limit, say
        self.sizes, self.region = model.config("transformer"), region
        self.base = flops.transformer_shapes(self.sizes)
        height, width = options.data.size
        self.target = height * width // model.sizes.token_pixels**2
        self.text = options.model.max_text_tokens or model.max_text_tokens
        self.chip = topology.chip or _UNKNOWN
        self.attention = choose(options.model.attention, topology.devices[0].platform, options.model.dtype)

    def shapes(self) -> list[Shape]:
        """Mesh shapes that split the model and the samples evenly, the fastest first."""
        n = len(self.topology.devices)
        shapes = [(n // (fsdp * tensor), fsdp, tensor) for tensor in _divisors(n) for fsdp in _divisors(n // tensor)]
        shapes = [shape for shape in shapes if self._can_run(shape)]
        best = {
            shape: [min(self.settings(name, shape), default=None, key=_speed) for name in NAMES] for shape in shapes
        }
        possible = [shape for shape in shapes if all(best[shape])]
        return sorted(possible, key=lambda shape: sum(setting.seconds for setting in best[shape]))

    def _mesh(self, shape: Shape) -> Mesh:
        return make_mesh(dict(zip(AXES, shape, strict=True)), self.topology.devices)

    def _can_run(self, shape: Shape) -> bool:
        try:
            check_mesh(self.options, self._mesh(shape), self.sizes.num_attention_heads)
        except UsageError:
            return False
        return True

    def settings(self, name: str, shape: Shape, options: Options | None = None) -> list[Setting]:
        """Micro-batches and, for the update, remat policies of a program that may fit; the fastest first.

        Args:
            name: Of the program.
            shape: Of the mesh.
            options: Say how many candidates are decoded, and how many at a time; all by default.
        """
        options = options or with_changes(self.options, dict.fromkeys(MICRO_BATCH.values(), 0))
        mesh = self._mesh(shape)
        weights = place(self.base, mesh, jnp.dtype(self.options.model.dtype), self.options.model.quantization)
        held = sum(device_bytes(leaf) for leaf in jax.tree.leaves(weights))
        parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(self.base))  # gathered after dequantisation
        whole = parameters * jnp.dtype(self.options.model.dtype).itemsize / shape[2]
        samples = micro_batches(options)["rollout"] if name == "decode" else counts(options)[name == "update"]
        spread = shape[0] * shape[1]
        policies = [options.model.remat]
        if name == "update":
            policies = [x for x in REMAT_POLICIES if not quantization_problems(replace(options.model, remat=x))]
        found = []
        for remat in policies:
            changes = dict(zip((f"mesh.{axis}" for axis in AXES), shape, strict=True))
            changes |= {"model.remat": remat} if name == "update" else {}
            for micro in _divisors(samples):
                if micro % (math.lcm(spread, options.rollout.prompts) if name == "rollout" else spread) == 0:
                    time = self._time(name, shape, remat, samples // micro, micro // spread, whole)
                    needed = held + self._activations(name, remat, micro // spread) / shape[2]
                    chosen = changes | {MICRO_BATCH[name]: micro}
                    if name == "rollout":  # and as many of them decoded at a time as before, or the next that divides
                        both = math.gcd(micro, micro_batches(options)["decode"])
                        chosen[MICRO_BATCH["decode"]] = both if both % spread == 0 else spread
                    found.append(Setting(chosen, micro, time.seconds, needed))
        limit = self.topology.memory or math.inf
        return sorted((setting for setting in found if setting.needed <= limit), key=_speed)

    def _time(self, name: str, shape: Shape, remat: str, chunks: int, samples: int, whole: float) -> Time:
        """Least time of a program: its FLOPs, its gathers of the weights, its sums over `tensor`.

        Args:
            chunks: Micro-batches.
            samples: Samples of one on a device.
            whole: Bytes of the weights that a device works with, gathered.
        """
        options = with_changes(self.options, {"model.remat": remat})
        sizes = self.sizes, self.model.config("vae")
        if name == "rollout":
            options = with_changes(options, {MICRO_BATCH[name]: counts(options)[0] // chunks})
        spread = self.region, shape[0] * shape[1]
        work = flops.step(options, *sizes, self.text, self.target, self.attention, *spread)[name]
        if name == "decode":
            return Time(work / len(self.topology.devices) / self.chip.flops, 0.0, 0.0)
        rolled = num_evaluations(options.rollout.solver, options.rollout.num_steps)
        passes = rolled if name == "rollout" else 2 + (remat != "none")
        gathered = whole * (shape[1] - 1) / shape[1]
        tokens = self.text + 2 * self.target
        summed = 2 * self.sizes.num_blocks * samples * tokens * self.sizes.width * 2 * 2 * (shape[2] - 1) / shape[2]
        # `data` is the outermost axis: the others stay inside a slice if they fit there.
        inside = shape[1] * shape[2] <= len(self.topology.devices) // len(set(self.topology.slices.tolist()))
        network = chunks * passes * (gathered + summed) / (self.chip.ici if inside else self.chip.dcn)
        return Time(work / len(self.topology.devices) / self.chip.flops, 0.0, network)

    def _activations(self, name: str, remat: str, samples: int) -> float:
        """Bytes that the backward pass keeps at least, of `samples` samples."""
        if name != "update":
            return 0.0
        tokens, blocks = self.text + 2 * self.target, self.sizes.num_blocks
        item = jnp.dtype(self.options.model.dtype).itemsize
        stream = blocks * tokens * self.sizes.width * item
        # Outputs of the linear layers of a block: q, k, v and out or its like (4 D to 5 D) and the MLP's 4 D.
        return samples * {"full": stream, "dots": 8 * stream, "none": 12 * stream}[remat]

    def first_that_fits(self, name: str, settings: list[Setting], options: Options) -> tuple[Setting, Plan] | None:
        """Compiles a program under one setting after another until one fits or the limit is reached."""
        refused: list[tuple[Setting, Plan]] = []
        for setting in settings:
            if self.limit <= 0:
                return None
            if any(self._hopeless(setting, *other) for other in refused):
                continue
            self.limit -= 1
            workload = Workload(with_changes(options, setting.changes), self.model, self.topology, self.region)
            plan = workload.compile(name)
            self.say(f"{describe(setting.changes)}: {summary(plan)}")
            if plan.fits:
                return setting, plan
            refused.append((setting, plan))
        return None

    def _hopeless(self, setting: Setting, other: Setting, plan: Plan) -> bool:
        """Whether a setting must need too much, given what another of the same kind asked for."""
        same = all(setting.changes[field] == value for field, value in other.changes.items() if "micro" not in field)
        grown = other.needed + (plan.needed - other.needed) * min(1.0, setting.micro_batch / other.micro_batch)
        return same and grown > plan.available

    def run(self) -> list[FittingSettings]:
        """All settings found under which every program fits, the fastest first, and the first of each mesh shape."""
        found = []
        for shape in self.shapes():
            changes, plans = dict.fromkeys(MICRO_BATCH.values(), 0), {}
            for name in ("update", "rollout", "decode"):  # the update asks for most; what is decoded was rolled out
                options = with_changes(self.options, changes)
                pair = self.first_that_fits(name, self.settings(name, shape, options), options)
                if pair is None:
                    break
                changes |= pair[0].changes
                plans[name] = pair[1]
            if len(plans) == len(NAMES):
                ordered = [plans[name] for name in NAMES]
                found.append(FittingSettings(changes, ordered, step_seconds(self.options, ordered, self.topology.chip)))
        return sorted(found, key=lambda item: item.seconds)

    def nearest(self, failed: list[Plan], shape: Shape) -> tuple[dict[str, Any], list[Plan]] | None:
        """The least change that makes the failed programs fit: smaller micro-batches first, then `remat=full`.

        Returns:
            Fields to set and the programs as compiled with them, or None if nothing fits on this mesh shape.
        """
        options, plans = self.options, []
        bounds = {plan.name: plan.micro_batch - 1 for plan in failed}
        for name in NAMES:
            if name not in bounds:
                continue
            pair = self.first_that_fits(name, list(self._nearer(name, bounds[name], shape, options)), options)
            if pair is None:
                return None
            options = with_changes(options, pair[0].changes)
            plans.append(pair[1])
            if name == "rollout":  # it holds more while it decodes
                bounds["decode"] = min(micro_batches(options)["decode"], bounds.get("decode", math.inf))
        old, new = (flatten_dict(asdict(x), sep=".") for x in (self.options, options))
        fields = (*MICRO_BATCH.values(), "model.remat")
        return {field: new[field] for field in fields if new[field] != old[field]}, plans

    def _nearer(self, name: str, bound: int, shape: Shape, options: Options) -> Iterator[Setting]:
        """Settings with micro-batches up to a bound, and with `remat=full` those just above it too; largest first."""
        settings = sorted(self.settings(name, shape, options), key=lambda setting: -setting.micro_batch)
        for remat in dict.fromkeys((options.model.remat, "full")):
            for setting in settings:
                same = setting.changes.get("model.remat", remat) == remat
                if same and setting.micro_batch <= bound + (remat != options.model.remat):
                    yield setting


def _speed(setting: Setting) -> tuple[float, int]:
    return setting.seconds, -setting.micro_batch


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def describe(changes: Mapping[str, Any]) -> str:
    """Settings as flags of the command line."""
    return " ".join(f"--config.{field}={value}" for field, value in changes.items())


def summary(plan: Plan) -> str:
    """One line about a compiled program."""
    room = "" if plan.available is None else f" of {plan.available / 2**30:.2f}"
    verdict = "" if plan.fits else ", too much"
    return f"{plan.name} needs {plan.needed / 2**30:.2f}{room} GiB a device{verdict} ({plan.seconds:.0f} s to compile)"
