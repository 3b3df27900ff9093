"""`python -m benchmarks.solvers`: how many steps, and evaluations of the model, each solver needs for the same edit.

Scenes of `validation` are edited by each solver from the same noises. A number is the PSNR of its pictures to those of
`--reference` steps of Euler's, the mean over the scenes. The reference has an error too: solvers of second order come
no nearer to it than that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.editors.base import sample
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.edit import initial_noise
from rcgrpo_jax.evaluation.statistics import mean_interval
from rcgrpo_jax.evaluation.tables import Table, markdown
from rcgrpo_jax.flow.solvers import SOLVERS, choose_solver, num_evaluations
from rcgrpo_jax.report.plots import COLOURS, DASHES

STEPS = (2, 4, 8, 12, 16, 28)

Pictures = Float[np.ndarray, "P H W 3"]


class Row(NamedTuple):
    """What a solver reaches in K steps."""

    solver: str
    steps: int
    psnr: Float[np.ndarray, " P"]  # dB

    @property
    def evaluations(self) -> int:
        return num_evaluations(self.solver, self.steps)


def open_sampler(model: str, count: int, seed: int) -> Callable[[str, int], Pictures]:
    """A function of solver and steps that edits the scenes, from the same noises each time."""
    editor, source = open_model(model).open(EditorOptions()), Scenes("validation", count)
    scenes = [source[i] for i in range(count)]
    pixels, grid = np.stack([x.image for x in scenes]), editor.grid(*scenes[0].image.shape[:2])
    encoded = editor.encode(pixels, [x.instruction for x in scenes])
    condition = editor.networks.condition(encoded, 2.5)
    shape = editor.networks.source(condition).shape[1:]
    noise = initial_noise(np.uint32(seed), np.arange(count), shape)

    @partial(jax.jit, static_argnums=(3, 4))
    def edit(params: dict, noise: Array, condition: dict, solver: str, steps: int) -> Array:
        sigmas = editor.networks.sigmas(steps, shape[0])
        return sample(editor.networks, params, {}, noise, condition, sigmas, grid, choose_solver(solver, steps))[-1]

    def pictures(solver: str, steps: int) -> Pictures:
        return editor.decode(edit(editor.params, noise, condition, solver, steps), grid).astype(np.float64)

    return pictures


def measure(pictures: Callable[[str, int], Pictures], steps: Sequence[int], reference: int) -> Iterator[Row]:
    """A row for each solver and number of steps at which it is not Euler's."""
    wanted = pictures("euler", reference)
    for name, k in [(name, k) for name, solver in SOLVERS.items() for k in steps if k >= solver.least_steps]:
        error = np.square(pictures(name, k) - wanted).mean((1, 2, 3))
        with np.errstate(divide="ignore"):
            yield Row(name, k, 10 * np.log10(255**2 / error))


def draw(rows: Sequence[Row], reference: int, file: Path) -> None:
    """Draws the PSNR by steps and by evaluations, as SVG."""
    style: Mapping = {
        "svg.fonttype": "none", "svg.hashsalt": "solvers", "font.family": ["DejaVu Sans"], "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure((9, 3.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, count in zip(panels, ("steps", "evaluations"), strict=True):
            for i, name in enumerate(dict.fromkeys(row.solver for row in rows)):
                of_solver = [row for row in rows if row.solver == name]
                places = [getattr(row, count) for row in of_solver]
                mean, low, high = np.array([mean_interval(row.psnr[None]) for row in of_solver]).T
                line = {"color": COLOURS[i], "linestyle": DASHES[i], "marker": "os^"[i], "label": name}
                axes.plot(places, mean, markersize=4, linewidth=1.5, **line)
                axes.fill_between(places, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)
            axes.set_xscale("log")
            ticks = sorted({row.steps for row in rows} | {max(getattr(row, count) for row in rows)})
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
            axes.set_xlabel(f"{count} of the model" if count == "evaluations" else count)
            axes.grid(axis="y", color="0.9", linewidth=0.6)
        panels[0].set_ylabel(f"PSNR to {reference} steps of Euler's, dB")
        panels[0].legend(frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.solvers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small-editor", help="editor")
    parser.add_argument("--count", type=int, default=32, help="scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the noises")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of each solver")
    parser.add_argument("--reference", type=int, default=100, help="steps of the reference")
    parser.add_argument("--svg", type=Path, help="file for the plot")
    arguments = parser.parse_args(argv)
    rows, lines = [], [["solver", "steps", "evaluations", "PSNR, dB"]]
    try:
        pictures = open_sampler(arguments.model, arguments.count, arguments.seed)
        for row in measure(pictures, arguments.steps, arguments.reference):
            rows.append(row)
            mean, low, high = mean_interval(row.psnr[None])
            lines.append([row.solver, str(row.steps), str(row.evaluations), f"{mean:.1f} [{low:.1f}, {high:.1f}]"])
            print(*lines[-1], sep=" | ", flush=True)
        if arguments.svg:
            draw(rows, arguments.reference, arguments.svg)
    except UserError as error:
        parser.error(str(error))
    title = f"To {arguments.reference} steps of Euler's, mean of {arguments.count} scenes [95 % interval]"
    print(markdown([Table(title, lines)]))


if __name__ == "__main__":
    main()
