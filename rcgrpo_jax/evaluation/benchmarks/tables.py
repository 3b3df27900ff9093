"""The tables of a benchmark: means over its tasks beside the published ones, by task, differences, and what failed."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rcgrpo_jax.evaluation.benchmarks.base import Benchmark, PublishedTable
from rcgrpo_jax.evaluation.benchmarks.rows import EVERY, MISSING, Row, measures_of
from rcgrpo_jax.evaluation.measures import REGISTERED
from rcgrpo_jax.evaluation.measures.official import CAP as OFFICIAL_CAP
from rcgrpo_jax.evaluation.statistics import Interval, stratified_intervals
from rcgrpo_jax.evaluation.tables import Column, Table, format_interval

FEW = 30  # edits of a task: fewer make a bootstrap too narrow by 6 % or more
MEAN = "mean"  # of the tasks, in the place of a task
OURS, THEIRS, DIFFERENCE = "measured", "published", "difference"


class Edits(NamedTuple):
    """What was found of one editor's edits."""

    rows: Sequence[Row]  # of all examples, in one order for all editors
    extra: Mapping[str, Sequence[str]] = MappingProxyType({})  # task -> pictures that no example has


class Value(NamedTuple):
    """A number of the tables."""

    editor: str  # or `EDITOR - EDITOR`
    kind: str  # OURS, THEIRS or DIFFERENCE
    task: str  # or MEAN
    measure: str
    interval: Interval  # 95 %, by `stratified_intervals`
    count: int | None  # examples that it is of; None where nobody says


def compute_values(benchmark: Benchmark, editors: Mapping[str, Edits], seed: int = 0) -> list[Value]:
    """Computes every number of the tables: published ones, means, and paired differences from the first editor.

    Args:
        benchmark: Whose tasks and published rows.
        editors: Name -> rows of the same examples.
        seed: Of the bootstrap.
    """
    unknown = np.nan
    values = [
        Value(row.editor, THEIRS, task, name, Interval(mean, unknown, unknown), None)
        for row in benchmark.published.rows
        for task, means in {MEAN: row.values, **row.by_task}.items()
        for name, mean in means.items()
    ]
    found = measures_of(itertools.chain.from_iterable(edits.rows for edits in editors.values()))
    measures = [*(name for name in REGISTERED if name in found), *(name for name in found if name not in REGISTERED)]
    tables = {name: _by_measure(edits.rows, measures) for name, edits in editors.items()}
    first, *others = tables
    tasks = np.array([row.task for row in editors[first].rows])

    def add(editor: str, kind: str, measure: str, found: Float[np.ndarray, " N"]) -> None:
        strata = {task: found[tasks == task] for task in benchmark.tasks if (tasks == task).any()}
        counts = [int((~np.isnan(x)).sum()) for x in strata.values()]
        if any(counts):
            intervals = stratified_intervals([*strata.values()], seed)
            for task, interval, count in zip((MEAN, *strata), intervals, (sum(counts), *counts), strict=True):
                values.append(Value(editor, kind, task, measure, interval, count))

    for name, table in tables.items():
        for measure in measures:
            add(name, OURS, measure, table[measure])
    for name in others:
        for measure in measures:
            add(f"{name} - {first}", DIFFERENCE, measure, tables[name][measure] - tables[first][measure])
    return values


def make_tables(benchmark: Benchmark, editors: Mapping[str, Edits], values: Sequence[Value]) -> list[Table]:
    """Lays the numbers out: a group of measures after another, then how many edits there were.

    Args:
        benchmark: Whose tasks and titles.
        editors: As for `compute_values`.
        values: What it found.
    """
    tables, groups = [], {}
    for name in dict.fromkeys(value.measure for value in values if value.kind == OURS):
        group, column = _column(name)
        groups.setdefault(group, []).append(column)
    means = [x for x in values if x.task == MEAN and x.kind != DIFFERENCE]
    by_task = [_named_by_kind(x) for x in values if x.task != MEAN and x.kind != DIFFERENCE]
    differences = [x for x in values if x.kind == DIFFERENCE]
    for group, columns in groups.items():
        title = f"{benchmark.title}, {group} measures"
        tables.append(_lay_out(f"{title}: unweighted mean of the tasks [95 % interval]", "kind", columns, means))
        tables.append(_lay_out(f"{title}: by task [95 % interval]", "task", columns, by_task))
        if differences:
            title = f"{title}: difference from {next(iter(editors))}, in pairs (* excludes zero)"
            tables.append(_lay_out(title, "task", columns, differences))
    return [*tables, _counts(benchmark, editors)]


def subset_of(
    benchmark: Benchmark, editors: Mapping[str, Edits], indices: Collection[int], seed: int = 0
) -> tuple[list[Value], list[Table]]:
    """The numbers of the benchmark's subset by themselves, and their tables; none where the data have none of it.

    Args:
        benchmark: With a subset. Published rows are of all examples, and stand in none of these tables.
        editors: As for `compute_values`.
        indices: In the source, of the examples of the subset.
        seed: Of the bootstrap.
    """
    if benchmark.subset is None or not indices:
        return [], []
    name = benchmark.subset.name
    some = benchmark._replace(title=f"{benchmark.title}, {name}", published=PublishedTable())
    part = {x: Edits([row for row in edits.rows if row.index in indices]) for x, edits in editors.items()}
    values = compute_values(some, part, seed)
    *tables, _ = make_tables(some, part, values)
    return [value._replace(task=f"{value.task} ({name})") for value in values], tables


def remarks(
    benchmark: Benchmark,
    editors: Mapping[str, Edits],
    others: Mapping[str, int] = MappingProxyType({}),
    uncaptioned: int = 0,
) -> list[str]:
    """What a reader of the tables must know, a line each.

    Args:
        benchmark: Of the tables.
        editors: As for `compute_values`.
        others: Tasks that are none of the benchmark -> examples.
        uncaptioned: How many examples have no caption.
    """
    shown = {name for edits in editors.values() for name in measures_of(edits.rows)}
    is_beside = any(shown & row.values.keys() for row in benchmark.published.rows)
    lines = [f"Published rows: {benchmark.published.origin}.", *benchmark.remarks] if is_beside else []
    if benchmark.side is None:
        lines.append("There are no masks: what is measured within or outside a region is left out.")
    there = Counter(row.task for row in next(iter(editors.values())).rows)
    if is_beside and any(there[task] < count for task, count in benchmark.tasks.items()):
        total = sum(benchmark.tasks.values())
        lines.append(
            f"The data have {there.total():,} of {total:,} published examples: the published rows are of other edits."
        )
    if lacking := [task for task in benchmark.tasks if not there[task]]:
        lines.append(f"The data have no example of {', '.join(lacking)}: the mean is of the other tasks.")
    if others:
        found = ", ".join(f"{count} of {task or 'no task'}" for task, count in others.items())
        lines.append(f"Left out, as of tasks that are none of the benchmark: {found}.")
    if uncaptioned and "official_lc_t" in shown:
        lines.append(
            f"{uncaptioned} examples have no caption: official LC-T compares them with a blank, as CompBench's script "
            "does."
        )
    few = []
    for name, edits in editors.items():
        lines += _remarks_of(name, edits.rows)
        measured = Counter(row.task for row in edits.rows if not row.failure)
        if gone := [task for task in benchmark.tasks if there[task] and not measured[task]]:
            lines.append(f"{name}: no edit of {', '.join(gone)} was measured, so that there is no mean of the tasks.")
        few += [f"{name} {task} {measured[task]}" for task in benchmark.tasks if 0 < measured[task] < FEW]
    if few:
        lines.append(
            f"Fewer than {FEW} edits: {', '.join(few)}. Bootstraps of so few give intervals that are too narrow, and a "
            "star says little."
        )
    return [*lines, "Intervals are bootstraps over examples, stratified by task. Edits that failed are in no mean."]


def _remarks_of(name: str, rows: Sequence[Row]) -> list[str]:
    """What a reader must know of the values of one editor."""
    lines = []
    if equal := sum(row.values.get("official_psnr", 0) >= OFFICIAL_CAP for row in rows):
        lines.append(
            f"{name}: {equal} edits have a background that is equal to the source's. Official PSNR counts each as "
            f"{OFFICIAL_CAP:.0f} dB, where CompBench's script has infinity, and so would its mean."
        )
    for measure in measures_of(rows):
        if lost := sum(np.isnan(row.values.get(measure, np.nan)) for row in rows if not row.failure):
            lines.append(f"{name}: {measure} could not be measured of {lost} edits that are there; they are left out.")
    return lines


def to_csv(values: Sequence[Value]) -> str:
    """The numbers as CSV, a number a line, unrounded: `editor,kind,task,measure,mean,low,high,edits`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["editor", "kind", "task", "measure", "mean", "low", "high", "edits"])
    for value in values:
        bounds = ["" if np.isnan(x) else repr(x) for x in value.interval]
        writer.writerow([*value[:4], *bounds, "" if value.count is None else value.count])
    return text.getvalue()


def _column(name: str) -> tuple[str, Column]:
    """The group and the column of a measure. What is not registered is the score of a judge."""
    if one := REGISTERED.get(name):
        return one.group, Column(name, one.header, one.decimals, one.better)
    return "judge", Column(name, name, 3, "↑")


def _by_measure(rows: Sequence[Row], measures: Sequence[str]) -> dict[str, Float[np.ndarray, " N"]]:
    return {name: np.array([row.values.get(name, np.nan) for row in rows]) for name in measures}


def _lay_out(title: str, label: str, columns: Sequence[Column], values: Sequence[Value]) -> Table:
    """A line for each editor and each value of the field `label`, a cell for each of the columns."""
    names, found = {one.measure for one in columns}, {}
    for value in values:
        if value.measure in names:
            found.setdefault((value.editor, getattr(value, label)), {})[value.measure] = value
    lines = [
        [editor, text, _count(cells.values()), *(_cell(cells.get(one.measure), one) for one in columns)]
        for (editor, text), cells in found.items()
    ]
    return Table(title, [["editor", label, "edits", *(f"{one.header} {one.better}" for one in columns)], *lines])


def _counts(benchmark: Benchmark, editors: Mapping[str, Edits]) -> Table:
    """How many edits there should be, and what became of them."""
    header = ["editor", "task", "published", "in the data", "measured", "missing", "unreadable", "of no example"]
    lines = []
    for name, edits in editors.items():
        for task, published in benchmark.tasks.items():
            rows = [row for row in edits.rows if row.task == task]
            missing = sum(row.failure == MISSING for row in rows)
            failed = sum(bool(row.failure) for row in rows)
            extra = len(edits.extra.get(task, ()))
            counts = (published, len(rows), len(rows) - failed, missing, failed - missing, extra)
            lines.append([name, task, *(f"{count:,}" for count in counts)])
        if stray := edits.extra.get(EVERY):
            lines.append([name, EVERY, *[""] * 5, f"{len(stray):,}"])
    return Table(f"{benchmark.title}: examples and their edits", [header, *lines])


def _named_by_kind(value: Value) -> Value:
    """A published number says that it is one, where no column does."""
    return value._replace(editor=f"{value.editor}, {THEIRS}") if value.kind == THEIRS else value


def _cell(value: Value | None, column: Column) -> str:
    if value is None or np.isnan(value.interval.mean):
        return ""
    is_difference = value.kind == DIFFERENCE
    return format_interval(value.interval, column.decimals, sign=is_difference) + " *" * (
        is_difference and value.interval.excludes_zero
    )


def _count(cells: Sequence[Value]) -> str:
    """Of how many edits the numbers of a row are; a range where measures differ."""
    counts = sorted({value.count for value in cells if value.count is not None})
    return " to ".join(f"{count:,}" for count in (counts[:1] + counts[1:][-1:]))
