"""`rcgrpo ablate --config C --out O`: variants of a run against each other, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float
from ml_collections import ConfigDict

from rcgrpo_jax import __version__
from rcgrpo_jax.cli.config_file import keep_compilations, parse_with_config
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.paths import (
    PATH_FIELDS,
    check_apart,
    check_for_checkpoints,
    expand_fields,
    expand_home,
    path_fields,
    path_flag,
)
from rcgrpo_jax.data.sources import open_source, same_examples
from rcgrpo_jax.editors.open import check_fits
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.evaluation.tables import differences, group_table, make_tables, markdown, notes, plain
from rcgrpo_jax.experiments.ablation import (
    BASE,
    COMPONENTS,
    TAUS,
    GroupStatistics,
    Protocol,
    Variant,
    configure,
    group_statistics,
    parse_variant,
    run_base,
    run_variant,
    slug,
)  # fmt: skip
from rcgrpo_jax.report.page import Report, write_report
from rcgrpo_jax.report.plots import as_file, distributions
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.setup import check_model_fits, check_rollout
from rcgrpo_jax.runs.workdir import LOCK, hold, make_folder, write_text
from rcgrpo_jax.weights.load import ModelFolder

ABOUT = """Trains variants of one configuration, several seeds each, and evaluates all on the same held-out edits.

Runs and evaluations are kept: the same command goes on where it was stopped, and more seeds or variants add to it.
It uses one device."""
PAGES = ("table.md", "groups.md", "report.html")
WRITTEN = ("runs", "evaluations", "cache", "compiled", "*.md", "*.svg", "report.html*", LOCK)  # into --out
TABLES = {"components": COMPONENTS, "taus": TAUS}

Groups = Mapping[str, Float[np.ndarray, " Q"]]  # variant -> one value a group


def _flags(values: flags.FlagValues) -> None:
    path_flag("out", "directory of runs, evaluations and tables", values)
    flags.DEFINE_enum("table", None, [*TABLES], "variants of the paper: Table 2 (components) or 3 (taus)", values)
    flags.DEFINE_multi_string("variant", [], "NAME: FIELD=VALUE ...; a further variant", values)
    flags.DEFINE_integer(
        "seeds", 5, "training seeds, 0 .. seeds - 1; 0: no training, for --batches alone", 0, 1000, flag_values=values
    )
    path_flag("data", "held-out examples with targets", values, "scenes:heldout:500")
    flags.DEFINE_integer("steps", 28, "solver steps of the evaluation", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("eval_seed", 0, "seed of the evaluation's noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer(
        "batches", 0, "batches of groups explored before training by each variant (Fig. 5); 0: none", 0, 100_000,
        flag_values=values,
    )  # fmt: skip


def run(argv: list[str]) -> None:
    values = parse_with_config("ablate", ABOUT, argv, _flags, ("out",), "rcgrpo_jax.rl.config")
    config, out = values.config, Path(values.out)
    check_for_checkpoints("--out", values.out)
    expand_fields(config)
    check_apart("--out", out, {"--data": values.data, **path_fields(config), "data.cache": None}, WRITTEN)
    open_devices()
    variants = [*TABLES.get(values.table, ()), *map(read_variant, values.variant)]
    names = [variant.name for variant in variants]
    if not variants or len({"", BASE, *map(slug, names)}) < len(names) + 2:
        raise UsageError(
            f"--table, --variant: {', '.join(names) or 'none'} found; at least one was wanted, of names that differ in "
            "their letters and digits.",
            "Write --table components, or --variant 'NAME: FIELD=VALUE'.",
        )
    runs = {variant.name: configure(config, variant, 0) for variant in variants}
    for name, run in runs.items():  # before hours of training
        validate(run, 1)
        folder = ModelFolder(run.model.path)
        check_model_fits(run, folder)
        check_rollout(run, folder)
        if same_examples(run.data.path, values.data):
            raise UsageError(
                f"--data: {values.data} found, and {name!r} trains on {run.data.path}; other examples were wanted.",
                "Name a held-out split or folder.",
            )
    for (one, a), (other, b) in combinations(runs.items(), 2):
        if a == b:
            raise UsageError(f"variants {one!r} and {other!r} are the same run.", "Leave one of them out.")
        if values.batches and (a.data, a.rollout.prompts) != (b.data, b.rollout.prompts):
            raise UsageError(
                f"--batches: {one!r} and {other!r} differ in data or rollout.prompts; the same groups were wanted.",
                "Leave --batches out, and call it again for variants that explore the same examples.",
            )
    if not values.seeds and not values.batches:
        raise UsageError("--seeds: 0 found, and no --batches; nothing would be done.", "Raise one of them.")
    open_source(values.data, config.data.polarity, mask_value=config.data.mask_value)
    if values.seeds:
        check_fits(
            ModelFolder(config.model.path), config.data.size, values.steps, config.model.dtype, field="data.size"
        )
    config.data.cache = config.data.cache or str(out / "cache")
    keep_compilations(out)  # seeds share their programs
    make_folder(out, "--out", ("runs", "evaluations", "cache", "compiled"), (*PAGES, LOCK))
    with hold(out):
        compare(config, variants, runs, values, out)


def compare(
    config: ConfigDict,
    variants: Sequence[Variant],
    runs: Mapping[str, ConfigDict],
    values: flags.FlagValues,
    out: Path,
) -> None:
    """Makes the runs and evaluations that are missing, and writes and prints all results."""
    sections: dict[str, Any] = {}
    facts = {x.name: ", ".join(f"{field} = {value}" for field, value in x.changes.items()) for x in variants}
    if values.seeds:
        protocol = Protocol(values.data, values.steps, values.eval_seed)
        facts["Evaluation"] = f"{protocol.data}, {protocol.num_steps} solver steps, seed {protocol.seed}"
        rows = evaluated(config, variants, values.seeds, protocol, out)
        sections |= {"tables": make_tables(rows), "differences": differences(rows)}
    if values.batches:
        distinct = {}  # variants that differ in their rewards alone explore alike
        for variant in variants:
            run = runs[variant.name]
            distinct.setdefault((str(run.explore), str(run.rollout), str(run.model)), variant)
        found = {x.name: group_statistics(config, x, 0, out, values.batches) for x in distinct.values()}
        sections["distributions"] = explored(found, out)
    page = Report(
        f"Ablation: {out.absolute().name}", {**facts, "Written by": f"rcgrpo_jax {__version__}"}, **sections
    )  # fmt: skip
    write_report(out / "report.html", page)
    print(f"page         {out / 'report.html'}")


def read_variant(text: str) -> Variant:
    """A variant of `--variant`, with `~` in its paths replaced."""
    name, changes = parse_variant(text)
    return Variant(
        name,
        {
            field: expand_home(f"--variant: {field}", x) if field in PATH_FIELDS and isinstance(x, str) else x
            for field, x in changes.items()
        },
    )


def evaluated(
    config: ConfigDict, variants: Sequence[Variant], seeds: int, protocol: Protocol, out: Path
) -> dict[str, list[Evaluation]]:
    """Trains and evaluates what is not there yet, and writes and prints the tables; row -> evaluations."""
    rows = {BASE: [run_base(config, protocol, out)], **{variant.name: [] for variant in variants}}
    remarks = "\n".join(notes(rows[BASE][0]))
    for seed in range(seeds):  # seed by seed, so that what is there after any of them is balanced
        for variant in variants:
            rows[variant.name].append(run_variant(config, variant, seed, protocol, out))
        write_text(out / "table.md", f"{markdown(make_tables(rows))}\n{remarks}\n")
    print(f"{plain(make_tables(rows))}\n{remarks}\n")
    print(f"table        {out / 'table.md'}")
    return rows


def explored(found: Mapping[str, GroupStatistics], out: Path) -> dict[str, Groups]:
    """Draws Fig. 5, and writes and prints its medians and the paired differences; label -> values."""
    rewards = dict.fromkeys(reward for x in found.values() for reward in x.reward_std)
    figures = {"drift": ("background drift", {name: x.drift for name, x in found.items()})} | {
        f"reward_std_{reward}": (
            f"within-group standard deviation, {reward}",
            {name: x.reward_std[reward] for name, x in found.items() if reward in x.reward_std},
        )
        for reward in rewards
    }
    tables = [group_table(label, groups) for label, groups in figures.values()]
    write_text(out / "groups.md", markdown(tables))
    print(f"{plain(tables)}\ntable        {out / 'groups.md'}")
    for file, (label, groups) in figures.items():
        write_text(out / f"{file}.svg", as_file(distributions(groups, label)))
        print(f"plot         {out / f'{file}.svg'}")
    return dict(figures.values())
