"""Plots of a report, as SVG text to stand inline in a page: in its font and text colour, on its background."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rcgrpo_jax.evaluation.statistics import Interval

COLOURS = ("#1F83C6", "#D55E00", "#009E73", "#B8639A", "#B08400")  # after Okabe and Ito, as clear on white as on black
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (3, 1)))  # where colours are not told apart
_WIDTH, _LINE = 4.6, 11  # inches of a plot; points from one line of text to the next
_NUMBERS = FuncFormatter(lambda x, _: f"{x:.4g}")  # without a common factor above the axis
_INK = "#010203"  # stands for the page's text colour while matplotlib draws
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name may hold any characters
    "font.family": ["DejaVu Sans"],  # for its widths; the page writes in its own
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.color": _INK,
    "ytick.major.size": 0,
}


class Panel(NamedTuple):
    """One plot of curves."""

    title: str
    unit: str
    names: tuple[str, ...]  # metrics; one that ends in "/" stands for all that start so
    log: bool = False  # logarithmic, where all values are positive
    sparse: bool = False  # whether a line joins values between which there are steps without any


PANELS = (
    Panel("Rewards", "mean over the batch, as scored", ("reward/",)),
    Panel("Standard deviation of rewards", "within groups; total: of the weighted z-scores", ("reward_std/",)),
    Panel("Watched rewards", "mean over the batch, as scored; not learned from", ("watch/",)),
    Panel("Held-out samples", "mean, edited by the LoRA", ("samples/",), sparse=True),
    Panel("Held-out samples, base", "mean, edited without the LoRA", ("samples_base/",), sparse=True),
    Panel("Correlation of rewards", "within groups", ("reward_corr/",)),
    Panel("Weights of rewards", "of those with a schedule", ("reward_weight/",)),
    Panel("Background", "mean absolute difference outside the mask, of 1", ("background/",)),
    Panel("Region", "mean absolute difference inside the mask, of 1", ("region/",)),
    Panel("Loss", "", ("loss", "loss_everywhere", "loss_inside")),
    Panel("Distance to the source", "squared, of anchors, outside the mask", ("source_distance",)),
    Panel("KL divergence", "", ("kl",)),
    Panel("Distances of velocities", "mean square, to the old adapter's and the base's", ("from_old", "from_base")),
    Panel("Penalty by region", "", ("region_penalty",)),
    Panel("PSNR", "dB", ("psnr",)),
    Panel("Gradient norm", "before clipping", ("grad_norm",), log=True),
    Panel("Ratio", "largest |ratio - 1| of a step", ("ratio_deviation",)),
    Panel("Random steps", "mean over the window, counted from 1", ("random_step",)),
    Panel("Clipped ratios", "share of all", ("clip_fraction",)),
    Panel("Groups that teach nothing", "of a batch", ("groups/",)),
    Panel("Speed", "samples / s", ("samples_per_second",)),
)


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draws the metrics of a run over its steps: every value thin, the mean over the last 1/25 of the run thick.

    Args:
        metrics: A dictionary a step, with `step`; a value may be missing or None.

    Returns:
        An SVG for each of `PANELS` that the run has a finite value for.
    """
    steps = np.array([entry["step"] for entry in metrics])
    present = dict.fromkeys(name for entry in metrics for name in entry)
    plots = []
    for panel in PANELS:
        series = {
            name.split("/", 1)[-1]: np.array([entry.get(name) for entry in metrics], float)  # None becomes NaN
            for name in present
            if any(name == wanted or (wanted.endswith("/") and name.startswith(wanted)) for wanted in panel.names)
        }
        series = {name: values for name, values in series.items() if np.isfinite(values).any()}
        if series:
            shown = np.isfinite([*series.values()]).any(axis=0) if panel.sparse else np.full(len(steps), True)
            plots.append(_curve_panel(panel, steps[shown], {name: values[shown] for name, values in series.items()}))
    return plots


def distributions(arms: Mapping[str, Float[np.ndarray, " N"]], label: str) -> str:
    """Draws the empirical distribution function of each arm, and its median, as in Fig. 5 of the paper.

    Args:
        arms: Name -> values; those that are not finite are left out.
        label: What was measured, with its unit.
    """
    with _drawing(label, 1.6, bottom=0.5 + 0.19 * len(arms)) as axes:
        for i, (name, values) in enumerate(arms.items()):
            values = np.asarray(values)[np.isfinite(values)]
            if not values.size:
                continue
            median, style = np.median(values), _line(i)
            axes.ecdf(values, label=f"{name}, median {median:.3g}", linewidth=1.5, **style)
            axes.plot([median, median], [0, 0.5], color=style["color"], linewidth=0.8, linestyle=(0, (2, 2)))
            axes.plot(median, 0.5, "o", color=style["color"], markersize=4)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_yticks([0, 0.5, 1], ["none", "half", "all"])
        axes.figure.legend(loc="lower left", frameon=False, handlelength=3, borderpad=0.2)
        return _svg(axes.figure, label)


def as_file(svg: str) -> str:
    """A plot as a document of its own, which has to say that it is SVG."""
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def intervals(rows: Mapping[str, Interval], label: str) -> str:
    """Draws differences with their 95 % intervals under each other; the mark is full where the interval excludes zero.

    Args:
        rows: What is compared -> its interval.
        label: The measure, with its unit and the direction that is better.
    """
    with _drawing(label, 0.26 * len(rows), left=0.3, top=0.1) as axes:
        for y, interval in enumerate(rows.values()):
            axes.plot([interval.low, interval.high], [y, y], color=COLOURS[0], linewidth=1.5)
            filled = "full" if interval.excludes_zero else "none"
            axes.plot(interval.mean, y, "o", color=COLOURS[0], markersize=6, fillstyle=filled)
        axes.axvline(0, color=_INK, linewidth=0.6)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(_NUMBERS)
        return _svg(axes.figure, label)


def _line(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}


def _curve_panel(panel: Panel, steps: np.ndarray, series: Mapping[str, Float[np.ndarray, " K"]]) -> str:
    several, lowest = len(series) > 1, min(np.nanmin(values) for values in series.values())
    with _drawing(panel.title, 1.4, right=0.78 if several else 0.97) as axes:
        ends = {}
        for i, (name, values) in enumerate(series.items()):
            mean, style = _running_mean(values, max(1, len(values) // 25)), _line(i)
            axes.plot(steps, values, linewidth=0.5, alpha=0.5, color=style["color"])
            axes.plot(steps, mean, linewidth=1.5, **style)
            ends[name] = mean[np.isfinite(mean)][-1]
        if panel.log and lowest > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        elif axes.get_ylim()[0] < 0 <= lowest:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_NUMBERS)
        for text, size, height in ((panel.title, 10.5, 20), (panel.unit, 9, 8)):
            axes.annotate(text, (0, 1), (0, height), "axes fraction", textcoords="offset points", size=size)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if several:
            _label_ends(axes, ends)
        return _svg(axes.figure, panel.title)


def _running_mean(values: Float[np.ndarray, " K"], width: int) -> Float[np.ndarray, " K"]:
    """The mean of those of the last `width` values that are finite; NaN where there is none."""
    finite, window = np.isfinite(values), np.ones(width)
    total = np.convolve(np.where(finite, values, 0), window)[: len(values)]
    count = np.convolve(finite, window)[: len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _label_ends(axes: Axes, ends: Mapping[str, float]) -> None:
    """Writes each curve's name beside its end, moved up where it would stand on another."""
    axes.get_ylim()  # settles the limits
    lowest, scale = -np.inf, 72 / axes.figure.dpi
    for i, name in sorted(enumerate(ends), key=lambda item: ends[item[1]]):
        height = scale * (axes.transData.transform((0, ends[name]))[1] - axes.bbox.y0)
        lowest = max(height, lowest + _LINE)
        where = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (1, 0), (5, lowest), color=_line(i)["color"], **where)


@contextmanager
def _drawing(
    label: str, height: float, *, left: float = 0.13, right: float = 0.97, bottom: float = 0.45, top: float = 0.45
) -> Iterator[Axes]:
    """Axes on a figure of their own, `height` inches high with margins in inches; `left` and `right` are fractions.

    Names inside the SVG follow from the label, so that plots of one page do not share any.
    """
    total = bottom + height + top
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": label}):
        axes = Figure((_WIDTH, total)).add_axes((left, bottom / total, right - left, height / total))
        axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.6)
        yield axes


def _svg(figure: Figure, label: str) -> str:
    """The figure without what a page must not hold: a prologue, a size, styles and names that reach beyond it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    _, start, body = file.getvalue().partition("<svg")
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", body, flags=re.DOTALL)
    attributes, rest = body.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', attributes)[0]
    rest = rest.replace("xlink:href", "href").replace(_INK, "currentColor")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', rest))
    rest = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", rest)
    return f'{start} role="img" aria-label="{html.escape(label)}" {view_box}>{rest.strip()}'
