"""`rcgrpo ablate --config C --out O`: variants of a run against each other, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags

from rcgrpo_jax.cli.arguments import parse, write_text
from rcgrpo_jax.cli.config_file import check_config, keep_compilations
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.evaluation.plots import as_file, distributions
from rcgrpo_jax.evaluation.tables import make_tables, markdown, notes, plain
from rcgrpo_jax.training.ablation import (
    BASE,
    COMPONENTS,
    TAUS,
    Protocol,
    configure,
    group_statistics,
    parse_variant,
    run_base,
    run_variant,
    slug,
)  # fmt: skip
from rcgrpo_jax.training.config import validate

ABOUT = """Trains variants of one configuration, several seeds each, and evaluates all on the same held-out edits.

Runs and evaluations are kept: the same command goes on where it was stopped, and more seeds or variants add to it.
It uses one device."""
TABLES = {"components": COMPONENTS, "taus": TAUS}


def _flags(values: flags.FlagValues, argv: list[str]) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Python file with get_config(), common to all variants", values, sys_argv=argv
    )
    flags.DEFINE_string("out", None, "directory of runs, evaluations and tables", values)
    flags.DEFINE_enum("table", None, [*TABLES], "variants of the paper: Table 2 (components) or 3 (taus)", values)
    flags.DEFINE_multi_string("variant", [], "NAME: FIELD=VALUE ...; a further variant", values)
    flags.DEFINE_integer("seeds", 5, "training seeds, 0 .. seeds - 1", lower_bound=1, flag_values=values)
    flags.DEFINE_string("data", "scenes:heldout:500", "held-out examples with targets", values)
    flags.DEFINE_integer("steps", 28, "solver steps of the evaluation", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("eval_seed", 0, "seed of the evaluation's noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer(
        "batches", 0, "batches of groups explored before training by each variant (Fig. 5); 0: none", 0, None,
        flag_values=values,
    )  # fmt: skip


def run(argv: list[str]) -> None:
    check_config("ablate", argv, "rcgrpo_jax.training.config")
    values, _ = parse("ablate", ABOUT, argv, lambda v: _flags(v, argv), required=("config", "out"))
    config, out = values.config, Path(values.out)
    variants = [*TABLES.get(values.table, ()), *map(parse_variant, values.variant)]
    names = [variant.name for variant in variants]
    if not variants or len({"", BASE, *map(slug, names)}) < len(names) + 2:
        raise UsageError(
            f"--table, --variant: {', '.join(names) or 'none'} found; at least one was wanted, of names that differ in "
            "their letters and digits.",
            "Write --table components, or --variant 'NAME: FIELD=VALUE'.",
        )
    runs = {variant.name: configure(config, variant, 0) for variant in variants}
    for run in runs.values():  # before hours of training
        validate(run, 1)
    for (one, a), (other, b) in combinations(runs.items(), 2):
        if a == b:
            raise UsageError(f"variants {one!r} and {other!r} are the same run.", "Leave one of them out.")
    open_source(values.data, config.data.polarity)
    protocol = Protocol(values.data, values.steps, values.eval_seed)
    config.data.cache = config.data.cache or str(out / "cache")
    keep_compilations(out)  # seeds share their programs

    rows = {BASE: [], **{name: [] for name in names}}
    rows[BASE].append(run_base(config, protocol, out))
    for seed in range(values.seeds):  # seed by seed, so that what is there after any of them is balanced
        for variant in variants:
            rows[variant.name].append(run_variant(config, variant, seed, protocol, out))
        tables, remarks = make_tables(rows), "\n".join(notes(rows[BASE][0]))
        write_text(out / "table.md", f"{markdown(tables)}\n{remarks}\n")
    print(f"{plain(tables)}\n{remarks}\n")
    print(f"table        {out / 'table.md'}")
    if values.batches:
        distinct = {}  # variants that differ in their rewards alone explore alike
        for variant in variants:
            distinct.setdefault((str(runs[variant.name].explore), str(runs[variant.name].rollout)), variant)
        found = {x.name: group_statistics(config, x, 0, out, values.batches) for x in distinct.values()}
        plot(out / "drift.svg", "background drift", {name: x.drift for name, x in found.items()})
        for reward in next(iter(found.values())).reward_std:
            label = f"within-group standard deviation, {reward}"
            plot(out / f"reward_std_{reward}.svg", label, {name: x.reward_std[reward] for name, x in found.items()})


def plot(file: Path, label: str, groups: Mapping[str, np.ndarray]) -> None:
    """Draws one of Fig. 5's distributions, and prints its medians."""
    write_text(file, as_file(distributions(groups, label)))
    count = min(np.isfinite(group).sum() for group in groups.values())
    medians = "  ".join(f"{name} {np.nanmedian(group):.4g}" for name, group in groups.items())
    print(f"{label}, medians of {count} groups: {medians}")
    print(f"plot         {file}")
