"""The plot of a layer diagnosis: areas under the curve by block, and by how many of the last blocks count."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from rcgrpo_jax.experiments.layers import CHANCE, BlockSet, Diagnosis
from rcgrpo_jax.report.plots import COLOURS

_SERIES = (
    ("within", "within prompts: the better of two has the higher ACD"),
    ("across", "across rollouts: success or failure"),
)
_STYLE = {
    "font.family": ["DejaVu Sans"], "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6,
}  # fmt: skip


def draw_areas(found: Diagnosis, doubles: int) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the areas with their 95 % intervals; a ring marks the choice.

    Args:
        found: The diagnosis.
        doubles: How many of the first blocks are double; they stand on grey.
    """
    count = len(found.single)
    with matplotlib.rc_context(_STYLE):
        figure = Figure((9, 3.6), dpi=150, layout="constrained")
        each, last = figure.subplots(1, 2, sharey=True)
        _points(each, range(count), found.single, found.choice.block)
        if doubles:
            each.axvspan(-0.5, doubles - 0.5, color="0.93", zorder=0)
            each.annotate("double", (-0.4, 1), xycoords=("data", "axes fraction"), va="top", color="0.4")
        each.annotate("single", (doubles - 0.4, 1), xycoords=("data", "axes fraction"), va="top", color="0.4")
        each.set_xlabel("block, from 0")
        each.set_ylabel("area under the curve")
        _points(last, range(1, count + 1), found.last, found.choice.layers - 1)
        last.set_xlabel("the last blocks that count (acd.layers)")
        handles, labels = each.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def _points(axes: Axes, places: Sequence[int], sets: Sequence[BlockSet], chosen: int) -> None:
    """Both areas of some sets of blocks side by side, and the line of chance."""
    axes.axhline(CHANCE, color="0.3", linewidth=0.6)
    for i, (field, label) in enumerate(_SERIES):
        x = np.asarray(places) + (i - 0.5) * 0.24
        mean, low, high = np.array([getattr(one, field) for one in sets]).T
        axes.errorbar(
            x, mean, [mean - low, high - mean], fmt="os"[i], color=COLOURS[i], markersize=4, linewidth=1, label=label
        )
        if field == "within":
            axes.plot(x[chosen], mean[chosen], "o", color=COLOURS[i], markersize=10, fillstyle="none")
    axes.set_xlim(places[0] - 0.5, places[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9", linewidth=0.6)
