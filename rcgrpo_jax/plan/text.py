"""The plan as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from typing import Any

import jax

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.plan.chips import GIB
from rcgrpo_jax.plan.programs import Plan, Workload
from rcgrpo_jax.plan.roofline import roofline
from rcgrpo_jax.plan.search import FittingSettings, describe, step_seconds
from rcgrpo_jax.plan.topology import Topology
from rcgrpo_jax.rl.options import Options

TERA = 1e12


def step_estimate(
    options: Options, plans: Sequence[Plan], topology: Topology, efficiency: float, price: float | None
) -> dict[str, float] | None:
    """What a step takes and costs, or None if a program does not fit or the chip's figures are not known.

    Args:
        options: The run's.
        plans: All programs.
        topology: Devices.
        efficiency: Share of the roofline that is reached, in (0, 1].
        price: Of a chip-hour, in any currency; None: no cost.
    """
    if topology.chip is None or not all(plan.fits and plan.cost for plan in plans):
        return None
    least = step_seconds(options, list(plans), topology.chip)
    seconds = least / efficiency
    samples = 3600 / seconds * options.rollout.prompts * options.rollout.group_size
    found = {"roofline_seconds": least, "efficiency": efficiency, "seconds": seconds, "samples_per_hour": samples}
    if price is not None:
        hour = price * topology.chips
        found |= {"cost_per_hour": hour, "cost_per_step": hour * seconds / 3600}
        found |= {
            "cost_per_1000_samples": 1000 * hour / samples,
            "cost_of_run": hour * seconds / 3600 * options.train.num_steps,
        }
    return found


def as_dict(workload: Workload, plans: Sequence[Plan], step: dict[str, float] | None) -> dict[str, Any]:
    """Everything, in bytes, FLOPs and seconds, per device."""
    options, topology = workload.options, workload.topology
    programs = []
    for plan in plans:
        entry = {**asdict(plan), "fits": plan.fits}
        if plan.memory:
            entry["memory"]["peak"] = plan.memory.peak
        if plan.cost and topology.chip:
            entry["roofline"] = roofline(plan.cost, topology.chip)._asdict()
        programs.append(entry)
    return {
        "software": _versions(),
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(workload.mesh.shape),
        **({} if options.rollout.share == "none" else {"region": workload.region, "own_tokens": workload.own_tokens}),
        "fits": all(plan.fits for plan in plans),
        "programs": programs,
        "rewards": reward_bytes(workload),
        "step": step,
        "config": asdict(options),
    }


def _versions() -> dict[str, str]:
    """What compiled a plan: the versions of those of these packages that are installed."""
    found = {}
    for name in ("rcgrpo_jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def table(workload: Workload, plans: Sequence[Plan], step: dict[str, float] | None) -> str:
    """The plan in plain text."""
    topology, model = workload.topology, workload.options.model
    mesh = " x ".join(f"{axis} {size}" for axis, size in workload.mesh.shape.items())
    tokens = workload.editor.options.max_text_tokens + 2 * workload.programs.grid[0] * workload.programs.grid[1]
    room = "" if topology.memory is None else f", {topology.memory / GIB:.2f} GiB a device"
    parts = [
        f"model     {model.path}, {model.dtype}, quantization {model.quantization}, "
        f"attention {workload.attention}, remat {model.remat}, {tokens} tokens a sample\n"
        f"devices   {topology.name}: {topology.chips} chips, mesh {mesh}{room}" + "".join(_notes(workload)),
        _memory(plans),
        _work(plans, workload),
    ]
    if any(plan.cost and plan.cost.collectives for plan in plans):
        parts.append(_collectives(plans))
    if topology.chip and all(plan.cost for plan in plans):
        parts.append(_roofline(plans, topology))
    if step:
        parts.append(_step(step))
    return "\n\n".join(parts)


def _notes(workload: Workload) -> Iterator[str]:
    """A line for what candidates share, and one for each network of a reward."""
    rollout, own = workload.options.rollout, workload.own_tokens
    if rollout.share != "none":
        what = f"all but {own} tokens of a candidate" if own else "nothing"
        yield f"\nshared    {what}, with a region of {workload.region:.0%} of the picture (--region)"
    if own and rollout.share_full_steps:
        yield "\n          what is compiled is counted as if all steps were in full, not the formula"
    for path, size in reward_bytes(workload).items():
        if size is None:
            yield f"\nrewards   not counted: {' '.join(workload.rewards[path].problem.split())}"
        else:
            yield f"\nrewards   {path}: {size / GIB:.2f} GiB on every device, in what is held"


def reward_bytes(workload: Workload) -> dict[str, int | None]:
    """Bytes a device of the networks of rewards, by path; None of those that cannot be read here."""
    return {
        path: None if isinstance(found, UserError) else 4 * sum(x.size for x in jax.tree.leaves(found))
        for path, found in workload.rewards.items()
    }


def _memory(plans: Sequence[Plan]) -> str:
    rows = []
    for plan in plans:
        sizes = (
            [plan.memory.arguments, plan.memory.temporaries, plan.memory.outputs, plan.memory.held]
            if plan.memory
            else []
        )
        cells = [f"{size / GIB:.2f}" for size in sizes] or ["-"] * 4
        verdict = "" if plan.available is None else "fits" if plan.fits else "too much"
        rows.append([plan.name, str(plan.micro_batch), *cells, f"{plan.needed / GIB:.2f}", verdict])
    head = ["GiB a device", "micro-batch", "arguments", "temporaries", "outputs", "held", "peak", ""]
    return align([head, *rows])


def _work(plans: Sequence[Plan], workload: Workload) -> str:
    rows = [["TFLOP a device", "formula", "compiled", "ratio", "HBM GiB", "compile s"]]
    for plan in plans:
        cells = ["-"] * 3
        if plan.cost:
            cells = [
                f"{plan.cost.flops / TERA:.4g}",
                f"{plan.cost.flops / plan.analytic:.3f}",
                f"{plan.cost.bytes / GIB:.4g}",
            ]
        rows.append([plan.name, f"{plan.analytic / TERA:.4g}", *cells, f"{plan.seconds:.0f}"])
    notes = [
        f"{plan.name}: FLOPs of {count:.0f} calls of {target} are not in the compiled count"
        for plan in plans
        if plan.cost
        for target, count in plan.cost.uncounted.items()
    ]
    return "\n".join([align(rows), *notes])


def _collectives(plans: Sequence[Plan]) -> str:
    rows = [["GiB sent a device", "kind", "count", "in slice", "between"]]
    for plan in plans:
        for kind, traffic in sorted(plan.cost.collectives.items()) if plan.cost else ():
            rows.append(
                [plan.name, kind, f"{traffic.count:.0f}", f"{traffic.ici / GIB:.3g}", f"{traffic.dcn / GIB:.3g}"]
            )
    return align(rows)


def _roofline(plans: Sequence[Plan], topology: Topology) -> str:
    rows = [["roofline, s", "compute", "memory", "network", "bound by"]]
    for plan in plans:
        time = roofline(plan.cost, topology.chip)
        rows.append([plan.name, *(f"{seconds:.3g}" for seconds in time), time.bound])
    return align(rows)


def _step(step: dict[str, float]) -> str:
    lines = [
        f"step      {step['seconds']:.3g} s at {step['efficiency']:.0%} of the roofline "
        f"({step['roofline_seconds']:.3g} s), {step['samples_per_hour']:.4g} samples an hour"
    ]
    if "cost_per_hour" in step:
        lines.append(
            f"cost      {step['cost_per_hour']:.2f} an hour, {step['cost_per_1000_samples']:.3g} for 1000 samples, "
            f"{step['cost_of_run']:.2f} for the run's steps"
        )
    return "\n".join(lines)


def ranking(found: Sequence[FittingSettings], topology: Topology) -> str:
    """Settings that fit, the fastest first."""
    rows = [["", "roofline s", *(f"{plan.name} GiB" for plan in found[0].plans), "settings"]]
    for i, item in enumerate(found):
        peaks = (f"{plan.needed / GIB:.2f}" for plan in item.plans)
        rows.append([str(i + 1), f"{item.seconds:.3g}" if topology.chip else "-", *peaks, describe(item.changes)])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns: first and last to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
