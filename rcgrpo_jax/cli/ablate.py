"""`rcgrpo ablate --config C --out O`: variants of a run against each other, with intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags

from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.config_file import check_config, keep_compilations
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.lpips import MISSING
from rcgrpo_jax.evaluation.plots import distributions
from rcgrpo_jax.evaluation.tables import make_tables, markdown, plain
from rcgrpo_jax.training.ablation import (
    BASE,
    COMPONENTS,
    TAUS,
    Protocol,
    configure,
    explore,
    parse_variant,
    run_base,
    run_variant,
)  # fmt: skip
from rcgrpo_jax.training.config import validate

ABOUT = """Trains variants of one configuration, several seeds each, and evaluates all on the same held-out edits.

Runs and evaluations are kept: the same command goes on where it was stopped, and more seeds or variants add to it."""
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
    if not variants or len({BASE, *names}) <= len(names):
        raise UsageError(
            f"--table, --variant: {', '.join(names) or 'none'} found; at least one was wanted, of different names.",
            "Write --table components, or --variant 'NAME: FIELD=VALUE'.",
        )
    for variant in variants:  # before hours of training
        validate(configure(config, variant, 0), 1)
    protocol = Protocol(open_source(values.data), values.steps, values.eval_seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made ({error}).", "Choose a folder you can write to.") from None
    config.data.cache = config.data.cache or str(out / "cache")
    keep_compilations(out)  # seeds share their programs

    rows = {BASE: [], **{name: [] for name in names}}
    rows[BASE].append(run_base(config, protocol, out))
    for seed in range(values.seeds):  # seed by seed, so that what is there after any of them is balanced
        for variant in variants:
            rows[variant.name].append(run_variant(config, variant, seed, protocol, out))
        tables = make_tables(rows)
        (out / "table.md").write_text(markdown(tables), encoding="utf-8")
    print(plain(tables) + ("" if "lpips" in rows[BASE][0].measures else f"\n{MISSING}"))
    print(f"table        {out / 'table.md'}")
    if values.batches:
        found = {variant.name: explore(config, variant, 0, out, values.batches) for variant in variants}
        for field, label in (("drift", "background drift"), ("reward_std", "within-group reward std")):
            groups = {name: getattr(exploration, field) for name, exploration in found.items()}
            (out / f"{field}.svg").write_text(distributions(groups, label), encoding="utf-8")
            medians = "  ".join(f"{name} {np.median(group):.4g}" for name, group in groups.items())
            print(f"{label}, medians of {values.batches * config.rollout.prompts} groups: {medians}")
            print(f"plot         {out / f'{field}.svg'}")
