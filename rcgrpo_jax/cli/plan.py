"""`rcgrpo plan --config configs/X.py --topology v5e:4x4`: whether a run fits and what it takes, before renting."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from rcgrpo_jax.cli.config_file import parse_with_config
from rcgrpo_jax.cli.devices import leave_devices_alone, open_devices
from rcgrpo_jax.cli.paths import check_file, expand_fields, path_flag
from rcgrpo_jax.editors.flux_kontext import FluxKontext
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.options import read_options, with_changes
from rcgrpo_jax.parallel.mesh import AXES, make_mesh
from rcgrpo_jax.plan.chips import GIB
from rcgrpo_jax.plan.flops import REGION
from rcgrpo_jax.plan.gpu import cudnn_errors
from rcgrpo_jax.plan.programs import FLUX_KONTEXT, NAMES, Plan, Workload, at_largest, open_flux
from rcgrpo_jax.plan.search import MICRO_BATCH, Search, describe, summary
from rcgrpo_jax.plan.text import as_dict, ranking, step_estimate, table
from rcgrpo_jax.plan.topology import Topology, open_topology
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.setup import check_mesh, check_model_fits

ABOUT = f"""Compiles the rollout, decode and update programs of a configuration for a topology and says what they need.

No TPU or GPU is needed, and no weights: without model.path the shapes are FLUX.1-Kontext-dev's (`{FLUX_KONTEXT}`).
On two cores a program compiles in one to three minutes for TPUs, and in less than one for GPUs. The exit code is 1 if
one does not fit, with the nearest setting that does. A search is free in mesh, micro-batches and remat: what the file
or the command line says of them is not kept."""


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "v5e:4x4, v5p:4x4x4, h100:8, 2*v6e:16x16 (two slices), ..., or local", values)
    flags.DEFINE_bool("search", False, "try mesh shapes, micro-batches and remat policies; rank those that fit", values)
    flags.DEFINE_integer("limit", 12, "programs that a search, or a fix, compiles at most", 1, flag_values=values)
    flags.DEFINE_float("price", None, "of a chip-hour, in your currency", 0.0, flag_values=values)
    flags.DEFINE_float(
        "efficiency", 0.5, "share of the roofline that the step is taken to reach", 0.01, 1.0, flag_values=values
    )
    flags.DEFINE_float(
        "region", REGION, "with rollout.share: share of the picture of a batch's largest region", 0.0, 1.0,
        flag_values=values,
    )  # fmt: skip
    path_flag("json", "file to write the plan to", values)


def run(argv: list[str]) -> None:
    values = parse_with_config("plan", ABOUT, argv, _flags, ("topology",), "rcgrpo_jax.rl.config")
    config = values.config.copy_and_resolve_references()
    expand_fields(config)
    if values.json:
        check_file("json", Path(values.json), ".json")
    if values.topology == "local":
        open_devices()
    else:
        leave_devices_alone()  # nothing runs; and no plugin must look for what is not there
    topology = open_topology(values.topology)
    config.model.path = config.model.path or FLUX_KONTEXT
    config.data.path = config.data.path or "none"  # not read
    model = open_flux(config.model.path)
    with cudnn_errors():
        (_search if values.search else _plan)(config, model, topology, values)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _read(config: ConfigDict, model: FluxKontext) -> Options:
    """The options of a valid configuration; of buckets the largest, and a line says so."""
    options = read_options(Options, config)
    check_model_fits(options, model)
    planned = at_largest(options)
    if planned != options:
        height, width = planned.data.size
        _say(f"data.buckets: {options.data.buckets}: planned for its largest, {width} x {height} pixels")
    return planned


def _plan(config: ConfigDict, model: FluxKontext, topology: Topology, values: flags.FlagValues) -> None:
    validate(config, len(topology.devices))
    options = _read(config, model)
    check_mesh(options, make_mesh(vars(options.mesh), topology.devices), model.sizes.num_heads)
    workload = Workload(options, model, topology, values.region)
    plans = []
    for name in NAMES:
        plans.append(workload.compile(name))
        _say(summary(plans[-1]))
    step = step_estimate(options, plans, topology, values.efficiency, values.price)
    print(table(workload, plans, step))
    report = as_dict(workload, plans, step)
    failed = [plan for plan in plans if not plan.fits]
    if not failed:
        _write(values.json, report)
        return
    search = Search(options, model, topology, values.limit, _say, values.region)
    fix = search.nearest(failed, tuple(workload.mesh.shape[axis] for axis in AXES))
    changes = fix[0] if fix else next((found.changes for found in search.run()), None)
    _write(values.json, report | {"fix": changes})
    raise UserError(f"{topology.name}: {_problem(failed)}.", _remedy(changes, search))


def _search(config: ConfigDict, model: FluxKontext, topology: Topology, values: flags.FlagValues) -> None:
    # Whatever mesh and micro-batches the file has, they are what is searched for.
    freed = {f"mesh.{axis}": 1 for axis in AXES} | dict.fromkeys(MICRO_BATCH.values(), 0) | {"mesh.tensor": -1}
    config.update_from_flattened_dict(freed)
    validate(config, len(topology.devices))
    options = _read(config, model)
    check_mesh(options, make_mesh({"data": -1}, topology.devices), model.sizes.num_heads)
    search = Search(options, model, topology, values.limit, _say, values.region)
    found = search.run()
    if not found:
        _write(values.json, {"topology": topology.name, "found": []})
        raise UserError(f"{topology.name}: no setting was found that fits.", _remedy(None, search))
    print(ranking(found, topology) + "\n")
    reports = []
    for item in found:
        chosen = with_changes(options, item.changes)
        step = step_estimate(chosen, item.plans, topology, values.efficiency, values.price)
        workload = Workload(chosen, model, topology, values.region)
        if not reports:
            print(table(workload, item.plans, step))
        reports.append({"changes": item.changes, **as_dict(workload, item.plans, step)})
    _write(values.json, {"topology": topology.name, "found": reports})


def _problem(failed: list[Plan]) -> str:
    return ", ".join(
        f"{plan.name} needs {plan.needed / GIB:.2f} GiB of {plan.available / GIB:.2f} GiB a device" for plan in failed
    )


def _remedy(changes: dict[str, Any] | None, search: Search) -> str:
    if changes:
        return f"This fits, by the compiler: {describe(changes)}"
    if search.limit <= 0:
        return "The limit of compilations was reached before anything fitted: raise --limit, or take more chips."
    fewer_bits = ", set model.quantization=int8 or nf4" if search.options.model.quantization == "none" else ""
    others = "no micro-batch, remat policy or mesh helps"
    return f"Take more chips or chips with more memory{fewer_bits}, or lower data.size; {others}."


def _write(path: str | None, report: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--json: {path} cannot be written ({error.strerror}).", "Choose a path you can write to."
        ) from None
