"""The paper's tables of variants and measures, with intervals and paired differences, in Markdown and as plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.measures import EDITOR, REGISTERED, note
from rcgrpo_jax.evaluation.measures.official import CAP as OFFICIAL_CAP
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.evaluation.statistics import Interval, mean_interval, paired_interval

Variants = Mapping[str, Sequence[Evaluation]]  # a row of the table -> its evaluations, one a training seed


class Column(NamedTuple):
    """One measure of a table."""

    measure: str  # of `Evaluation.measures`
    header: str
    decimals: int
    better: str  # the direction that is better, ↑ or ↓


def all_columns() -> list[Column]:
    """A column for each of `evaluation.measures`."""
    return [Column(one.name, one.label, one.decimals, one.better) for one in REGISTERED.values()]


class Table(NamedTuple):
    """A title, and lines of cells, the header first."""

    title: str
    lines: list[list[str]]


def make_tables(variants: Variants, columns: Sequence[Column] | None = None) -> list[Table]:
    """Lays out the means of all variants, their paired differences from the first and from the row above, and seeds.

    Cells are `mean [low, high]` with 95 % intervals (`statistics`). A star marks a difference whose interval excludes
    zero. Columns that some evaluation lacks are left out. Where examples tell their kind, success is shown by kind too.

    Args:
        variants: Row -> evaluations of the same examples, one a training seed; the first row is the base.
        columns: What to show; all measures by default.

    Raises:
        UserError: Two evaluations differ in examples or settings.
    """
    evaluations = [evaluation for group in variants.values() for evaluation in group]
    _check_comparable(evaluations)
    columns = all_columns() if columns is None else columns
    columns = [column for column in columns if all(column.measure in x.measures for x in evaluations)]
    headers = [f"{column.header} {column.better}" for column in columns]
    names = list(variants)
    base = variants[names[0]]

    def values(group: Sequence[Evaluation], column: Column) -> Float[np.ndarray, "S N"]:
        return np.stack([evaluation.measures[column.measure] for evaluation in group])

    def difference(group: Sequence[Evaluation], other: Sequence[Evaluation]) -> list[str]:
        intervals = [(c, paired_interval(values(group, c), values(other, c))) for c in columns]
        return [format_interval(x, c.decimals, sign=True) + " *" * x.excludes_zero for c, x in intervals]

    means = [
        [name, str(len(group)), *(format_interval(mean_interval(values(group, c)), c.decimals) for c in columns)]
        for name, group in variants.items()
    ]
    count = len(evaluations[0].names)
    tables = [Table(f"Mean of {count} edits [95 % interval]", [["variant", "seeds", *headers], *means])]
    if len(names) > 1:
        lines = [[name, *difference(variants[name], base)] for name in names[1:]]
        tables.append(Table(f"Difference from {names[0]}, in pairs (* excludes zero)", [["variant", *headers], *lines]))
    if len(names) > 2:
        lines = [[f"{name} - {other}", *difference(variants[name], variants[other])] for other, name in pairwise(names)]
        tables.append(Table("Difference from the row above, in pairs", [["variants", *headers], *lines]))
    if lines := [
        [name, str(seed), *difference([evaluation], base)]
        for name in names[1:]
        for seed, evaluation in enumerate(variants[name])
        if len(variants[name]) > 1
    ]:
        title = f"Difference of each seed from {names[0]}, in pairs; intervals over edits"
        tables.append(Table(title, [["variant", "seed", *headers], *lines]))
    if None not in evaluations[0].kinds and all("success" in x.measures for x in evaluations):
        tables.append(_by_kind(variants))
    return tables


def differences(variants: Variants, columns: Sequence[Column] | None = None) -> dict[str, dict[str, Interval]]:
    """Measure -> row -> its paired difference from the first row, to be drawn; arguments as for `make_tables`."""
    (base, reference), *others = variants.items()
    columns = all_columns() if columns is None else columns

    def difference(evaluations: Sequence[Evaluation], measure: str) -> Interval:
        return paired_interval(*(np.stack([x.measures[measure] for x in group]) for group in (evaluations, reference)))

    return {
        f"{column.header} {column.better}, difference from {base}": {
            name: difference(evaluations, column.measure) for name, evaluations in others
        }
        for column in columns
        if others and all(column.measure in x.measures for group in variants.values() for x in group)
    }


def group_table(label: str, groups: Mapping[str, Float[np.ndarray, " Q"]]) -> Table:
    """Medians over groups, and the paired differences from the first row: what a plot of the distributions shows.

    Args:
        label: What the values are.
        groups: Row -> one value a group, of the same groups in the same order.
    """
    (first, reference), *_ = groups.items()

    def difference(values: Float[np.ndarray, " Q"]) -> str:
        interval = paired_interval(values[None], reference[None])
        return "{:+.3g} [{:+.3g}, {:+.3g}]".format(*interval) + " *" * interval.excludes_zero

    header = ["variant", "median", f"less {first}, mean of pairs (* excludes zero)"]
    lines = [
        [name, f"{np.nanmedian(values):.3g}", "" if name == first else difference(values)]
        for name, values in groups.items()
    ]
    return Table(f"{label}, {len(reference)} groups", [header, *lines])


def notes(evaluation: Evaluation, *others: Evaluation) -> list[str]:
    """What a reader of the tables must know to read them right, a line each; of all evaluations in them."""
    evaluations = (evaluation, *others)
    measured = set.intersection(*(set(x.measures) for x in evaluations))
    editor = [one for one in REGISTERED.values() if one.group == EDITOR]
    of_editor = any(one.name in measured for one in editor) or not measured
    lines = []
    if of_editor:
        lines.append(
            "Edit success and PSNR are parts of overall, the oracle's score, and PSNR and SSIM make up the reward "
            "`preservation`: what a run was rewarded with, it was trained for, on other pictures. Caption and LPIPS "
            "are in no reward."
        )
    if "acd" in measured:
        lines.append(f"ACD is that of the last {evaluation.settings['acd_layers']} blocks.")
    return [
        *lines,
        "The interval of a single seed is that of the one model. Stars are not corrected for the number of cells.",
        *_official_notes(evaluations, measured),
        *_lost(evaluations, measured),
        *(note(one) for one in editor if of_editor and one.name not in measured),
    ]


def _official_notes(evaluations: Sequence[Evaluation], measured: set[str]) -> list[str]:
    """Where the group `official` has a value for what hardly has one."""
    lines, first = [], evaluations[0]
    if "official_lc_t" in measured and first.uncaptioned:
        lines.append(
            f"{first.uncaptioned} of {len(first.names)} examples have no caption: official LC-T compares them with a "
            "blank, as CompBench's script does."
        )
    if "official_psnr" in measured:
        equal = [int((x.measures["official_psnr"] >= OFFICIAL_CAP).sum()) for x in evaluations]
        if any(equal):
            lines.append(
                f"{' and '.join(map(str, equal))} edits have a background that is equal to the source's. Official PSNR "
                f"counts each as {OFFICIAL_CAP:.0f} dB, where CompBench's script has infinity, and so has its mean."
            )
    return lines


def _lost(evaluations: Sequence[Evaluation], measured: set[str]) -> list[str]:
    """A line for each measure that has no value for some edits."""
    lines = []
    for name in (name for name in REGISTERED if name in measured):
        count = int(np.any([~np.isfinite(x.measures[name]) for x in evaluations], axis=0).sum())
        if count:
            one = REGISTERED[name]
            why = "" if one.group == EDITOR else f": {one.wanted}"
            lines.append(
                f"{one.label} is not measured of {count} of {len(evaluations[0].names)} edits, which are left out of "
                f"its means and, in pairs, of its differences{why}."
            )
    return lines


def _by_kind(variants: Variants) -> Table:
    """Edit success of each kind of task."""
    kinds = next(iter(variants.values()))[0].kinds
    names = list(dict.fromkeys(kinds))

    def cell(evaluations: Sequence[Evaluation], kind: str) -> str:
        chosen = [i for i, other in enumerate(kinds) if other == kind]
        return format_interval(mean_interval(np.stack([x.measures["success"][chosen] for x in evaluations])), 3)

    lines = [[name, *(cell(evaluations, kind) for kind in names)] for name, evaluations in variants.items()]
    return Table("Edit success by kind", [["variant", *names], *lines])


def markdown(tables: Sequence[Table]) -> str:
    """The tables in Markdown."""
    parts = []
    for title, (header, *lines) in tables:
        rule = ["---"] * len(header)
        rows = ([markdown_line(cell).replace("|", r"\|") for cell in line] for line in (header, rule, *lines))
        parts += [f"**{markdown_line(title)}**", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(parts)


def markdown_line(text: str) -> str:
    """A text as a line of Markdown shows it: what names bring along is no line of its own, and no HTML."""
    return one_line(text).replace("<", "&lt;")


def one_line(text: str) -> str:
    """A text without characters that would end a line or steer a terminal: escapes stand for them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)


def latex(tables: Sequence[Table]) -> str:
    """The tables in LaTeX, for a document that has `booktabs`."""
    parts = ["% \\usepackage{booktabs}"]
    for title, (header, *lines) in tables:
        first, *rows = [f"{' & '.join(map(_latex_text, line))} \\\\" for line in (header, *lines)]
        parts += [
            "\\begin{table}", "\\centering", f"\\caption{{{_latex_text(title)}}}",
            f"\\begin{{tabular}}{{{'l' * len(header)}}}", "\\toprule", first, "\\midrule", *rows, "\\bottomrule",
            "\\end{tabular}", "\\end{table}", "",
        ]  # fmt: skip
    return "\n".join(parts)


def _latex_text(text: str) -> str:
    """A text as LaTeX prints it."""
    special = {**{x: f"\\{x}" for x in "&%$#_{}"}, "\\": "\\textbackslash{}", "~": "\\textasciitilde{}"}
    special |= {"^": "\\textasciicircum{}", "↑": "$\\uparrow$", "↓": "$\\downarrow$", "[": "{[}", "]": "{]}"}
    return "".join(special.get(x, x) for x in one_line(text))


def plain(tables: Sequence[Table]) -> str:
    """The tables with their columns aligned."""
    parts = []
    for title, found in tables:
        lines = [[one_line(cell) for cell in line] for line in found]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        parts += [one_line(title), *rows, ""]
    return "\n".join(parts)


def format_interval(interval: Interval, decimals: int, sign: bool = False) -> str:
    """`mean [low, high]`; the mean alone where its bounds are not known."""
    if np.isnan(interval.mean):
        return "-"  # nothing was measured
    mean, low, high = (f"{x:{'+' if sign else ''}.{decimals}f}" for x in interval)
    return mean if np.isnan(interval.low) else f"{mean} [{low}, {high}]"


def _check_comparable(evaluations: Sequence[Evaluation]) -> None:
    """Refuses other examples or settings than those of the first; of pictures alone, the settings are their data."""
    first = evaluations[0]
    for other in evaluations[1:]:
        a, b = ({"examples": len(x.names), **x.settings} for x in (first, other))
        common = a.keys() & b.keys() if first.of_pictures or other.of_pictures else a.keys() | b.keys()
        differing = [
            f"{name} {a.get(name)} and {b.get(name)}"
            for name in {**a, **b}
            if name in common and a.get(name) != b.get(name)
        ]
        if differing or other.names != first.names:
            raise UserError(
                f"evaluations with {', '.join(differing) or 'other names of examples'} found; the same examples and "
                "settings were wanted.",
                "Evaluate all models alike.",
            )
