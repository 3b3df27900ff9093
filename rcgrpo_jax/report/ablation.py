"""An ablation made and shown: what is missing is trained and evaluated, and all results are written into its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from rcgrpo_jax import __version__
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.evaluation.tables import Table, differences, group_table, make_tables, markdown, notes, plain
from rcgrpo_jax.experiments.ablation import (
    BASE,
    EvaluationSettings,
    GroupStatistics,
    Variant,
    check_variants,
    cost_of,
    group_statistics,
    run_base,
    run_variant,
)
from rcgrpo_jax.experiments.cost import cost_table
from rcgrpo_jax.progress import ProgressCallback, no_progress
from rcgrpo_jax.report.page import Report, write_report
from rcgrpo_jax.report.plots import as_file, distributions
from rcgrpo_jax.runs.workdir import LOCK, hold, make_folder, write_text

PAGES = ("table.md", "groups.md", "report.html")
WRITTEN = ("runs", "evaluations", "cache", "compiled", "*.md", "*.svg", "report.html*", LOCK)  # into the folder

EXPLORES = ("policy", "explore", "sde", "rollout", "model")  # what an exploration depends on

Groups = Mapping[str, Float[np.ndarray, " Q"]]  # variant -> one value a group
Say = Callable[[str], None]


def ablate(
    config: ConfigDict,
    variants: Sequence[Variant],
    out: Path,
    protocol: EvaluationSettings,
    *,
    seeds: int = 5,
    batches: int = 0,
    devices: Sequence[jax.Device] | None = None,
    say: Say = lambda text: None,
    progress: ProgressCallback = no_progress,
) -> Report:
    """Makes the runs and evaluations that are missing, and writes all results.

    Args:
        config: Common to all variants.
        variants: What each of them changes.
        out: Gets runs, evaluations, tables, plots and a page.
        protocol: Of the evaluation.
        seeds: Trainings of each variant, with seeds from 0; 0: none.
        batches: Batches of groups that each variant explores before training (Fig. 5); 0: none.
        devices: `config.mesh` is over these; all by default.
        say: Is given each result as text, when it is there.
        progress: Told of each edit of an evaluation.

    Returns:
        What the page shows.

    Raises:
        UserError: As `check_variants` and `run_variant`, or another process is at work in the folder.
        UsageError: As `check_variants`.
    """
    devices = jax.devices() if devices is None else devices
    runs = check_variants(config, variants, protocol, seeds, batches, devices)
    config = config.copy_and_resolve_references()
    config.data.cache = config.data.cache or str(out / "cache")
    make_folder(out, "--out", ("runs", "evaluations", "cache", "compiled"), (*PAGES, LOCK))
    sections: dict[str, Any] = {}
    facts = {x.name: ", ".join(f"{field} = {value}" for field, value in x.changes.items()) for x in variants}
    with hold(out):
        if seeds:
            facts["Evaluation"] = f"{protocol.data}, {protocol.num_steps} solver steps, seed {protocol.seed}"
            rows, tables = _evaluated(config, variants, seeds, protocol, out, devices, say, progress)
            sections |= {"tables": tables, "differences": differences(rows)}
        if batches:
            distinct = {}  # variants that differ in their rewards alone explore alike
            for variant in variants:
                run = runs[variant.name]
                distinct.setdefault(tuple(str(run[x]) for x in EXPLORES), variant)
            found = {x.name: group_statistics(config, x, 0, out, batches, devices) for x in distinct.values()}
            sections["distributions"] = _explored(found, out, say)
        facts["Written by"] = f"rcgrpo_jax {__version__}"
        page = Report(f"Ablation: {out.absolute().name}", facts, **sections)
        write_report(out / "report.html", page)
    say(f"page         {out / 'report.html'}")
    return page


def _evaluated(
    config: ConfigDict, variants: Sequence[Variant], seeds: int, protocol: EvaluationSettings, out: Path,
    devices: Sequence[jax.Device], say: Say, progress: ProgressCallback,
) -> tuple[dict[str, list[Evaluation]], list[Table]]:  # fmt: skip
    """Trains and evaluates what is not there yet, writes and tells the tables; row -> evaluations, and the tables."""
    rows = {BASE: [run_base(config, protocol, out, devices, progress)], **{variant.name: [] for variant in variants}}
    costs = {variant.name: [] for variant in variants}
    remarks = "\n".join(notes(rows[BASE][0]))
    for seed in range(seeds):  # seed by seed, so that what is there after any of them is balanced
        for variant in variants:
            rows[variant.name].append(run_variant(config, variant, seed, protocol, out, devices, progress))
            costs[variant.name].append(cost_of(variant, seed, out))
        tables = [*make_tables(rows), *([cost_table(costs)] if any(map(any, costs.values())) else [])]
        write_text(out / "table.md", f"{markdown(tables)}\n{remarks}\n")
    say(f"{plain(tables)}\n{remarks}\n")
    say(f"table        {out / 'table.md'}")
    return rows, tables


def _explored(found: Mapping[str, GroupStatistics], out: Path, say: Say) -> dict[str, Groups]:
    """Draws Fig. 5, and writes and tells its medians and the paired differences; label -> values."""
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
    say(f"{plain(tables)}\ntable        {out / 'groups.md'}")
    for file, (label, groups) in figures.items():
        write_text(out / f"{file}.svg", as_file(distributions(groups, label)))
        say(f"plot         {out / f'{file}.svg'}")
    return dict(figures.values())
