"""Edits side by side: of one model with and without adapters, or the pictures that other programs made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from rcgrpo_jax.data.example import NOTHING, Needs, Source
from rcgrpo_jax.data.images import resize_image, resize_mask, save_image
from rcgrpo_jax.editors.model import EditorOptions, Model
from rcgrpo_jax.editors.open import check_fits
from rcgrpo_jax.evaluation.edit import edit_all
from rcgrpo_jax.evaluation.evaluate import evaluate, need_targets
from rcgrpo_jax.evaluation.examples import check_targets
from rcgrpo_jax.evaluation.measure import NO_OPTIONS, measure
from rcgrpo_jax.evaluation.measures import MeasureOptions, choose, load_weights
from rcgrpo_jax.evaluation.result import PICTURED, Evaluation
from rcgrpo_jax.evaluation.tables import Table, make_tables, markdown, notes, plain
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.progress import ProgressCallback, count_steps, no_progress
from rcgrpo_jax.runs.grid import GridRow, comparison_grid
from rcgrpo_jax.runs.workdir import write_text
from rcgrpo_jax.weights.lora import adapter_fingerprint

FILES = ("*.npz", "table.md", "grid.png")  # that `compare` writes


class Comparison(NamedTuple):
    """What was found of some makers of edits on the same examples."""

    evaluations: dict[str, Evaluation]  # by their names, the first one the reference
    tables: list[Table]
    remarks: list[str]  # what a reader of the tables must know
    grid: UInt8[np.ndarray, "_ _ 3"]  # the first examples with all edits of them


def summary(comparison: Comparison, out: Path) -> str:
    """What people read of it: the tables as text, and where the files are."""
    files = ", ".join(str(out / f"{name}.npz") for name in comparison.evaluations)
    lines = [plain(comparison.tables), *comparison.remarks, "", f"measures  {files}"]
    return "\n".join([*lines, f"table     {out / 'table.md'}", f"grid      {out / 'grid.png'}"])


def compare(found: Iterable[tuple[str, Evaluation]], source: Source, out: Path, title: str = "") -> Comparison:
    """Puts evaluations of the same examples side by side, and writes them into a folder.

    Args:
        found: Name and evaluation of each maker; an evaluation is written when it is there.
        source: The examples.
        out: Gets `NAME.npz`, `table.md` and `grid.png`.
        title: Line above the pictures.

    Raises:
        UserError: The evaluations are of other examples or settings, or a file cannot be written.
    """
    evaluations = {}
    for name, evaluation in found:
        evaluations[name] = evaluation
        evaluation.save(out / f"{name}.npz")
    tables = make_tables({name: [evaluation] for name, evaluation in evaluations.items()})
    remarks = notes(*evaluations.values())
    write_text(out / "table.md", f"{markdown(tables)}\n" + "\n".join(remarks) + "\n")
    grid = comparison_grid(grid_rows(source, evaluations), title)
    save_image(out / "grid.png", grid)
    return Comparison(evaluations, tables, remarks, grid)


def evaluate_adapters(
    model: Model,
    source: Source,
    adapters: Mapping[str, dict | None],
    *,
    steps: int = 28,
    guidance: float = 2.5,
    seed: int = 0,
    solver: str = "euler",
    batch: int = 8,
    size: tuple[int, int] | None = None,
    dtype: str = "bfloat16",
    edits: Path | None = None,
    devices: Sequence[jax.Device] | None = None,
    measures: Sequence[str] | None = None,
    measure_options: MeasureOptions = NO_OPTIONS,
    progress: ProgressCallback = no_progress,
    **editor_options: Any,
) -> Iterator[tuple[str, Evaluation]]:
    """Edits all examples with each adapter, from the same noise, and measures the edits.

    Args:
        model: The model.
        source: Examples, with targets where a measure needs them.
        adapters: Name -> adapter with its scale folded in (`weights.lora.load_loras`); None is the base.
        steps: K.
        guidance: Guidance scale.
        seed: Of the noise.
        solver: A name of `flow.solvers.SOLVERS`.
        batch: Edits at a time.
        size: (height, width) in pixels; that of the first example by default.
        dtype: Of computation and parameters.
        edits: Folder that keeps the edits of each adapter, in a folder of its name, as they are made: what is there is
            not made again (`edit_all`). None: they are in memory alone.
        devices: The weights are spread over these; all by default.
        measures: Names of measures and of groups; the group `editor` by default.
        measure_options: Where weights of measures are that no package carries.
        progress: Told of each edit; the job has the adapter's name.
        **editor_options: Of `EditorOptions`: `max_text_tokens`, `quantization`, `acd_layers`.

    Yields:
        Name and evaluation of each adapter, as soon as it is there.

    Raises:
        UserError: As `evaluate`.
        UsageError: As `evaluate`.
    """
    chosen = choose(measures)
    load_weights(chosen, measure_options)  # what is missing is told before the editor is opened
    mesh = make_mesh({"fsdp": -1}, devices)
    if len(source):  # else `evaluate` says so
        height, width = size or source[0].image.shape[:2]
        check_fits(model, (height, width), steps, dtype, min(batch, len(source)))
    editor = model.open(EditorOptions(dtype=dtype, **editor_options), mesh)
    making = {
        "num_steps": steps, "guidance": guidance, "seed": seed, "solver": solver, "batch": batch, "size": size,
        "mesh": mesh,
    }  # fmt: skip
    for name, lora in adapters.items():
        options = {**making, "lora": lora, "progress": count_steps(progress, name, len(source))}
        if edits is None:
            found = evaluate(editor, source, range(len(source)), measures=measures, options=measure_options, **options)
        else:
            check_targets(source)
            strict = need_targets(chosen) or (len(source) and source[0].has_target)
            needs = Needs(right_target="evaluate") if strict else NOTHING  # before hours of edits
            edit_all(editor, source, range(len(source)), edits / name, needs=needs, **options)
            found = measure(edits / name, source, measures=measures, batch=batch, options=measure_options)
        yield name, replace(found, origin={"lora": adapter_fingerprint(lora)} if lora else {})


def measure_folders(
    folders: Mapping[str, Path],
    source: Source,
    *,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    measures: Sequence[str] | None = None,
    measure_options: MeasureOptions = NO_OPTIONS,
    progress: ProgressCallback = no_progress,
) -> Iterator[tuple[str, Evaluation]]:
    """Measures the pictures in folders, whoever made them; arguments, results and errors as `evaluate_adapters`.

    Args:
        folders: Name -> folder with a PNG for each example, named by it.
        source: The examples.
        batch: Pictures at a time.
        size: (height, width) of all pictures, as for `measure`.
        measures: Names of measures and of groups; the group `editor` by default.
        measure_options: Where weights of measures are that no package carries.
        progress: Told of each picture; the job has the folder's name.
    """
    for name, folder in folders.items():
        yield (
            name,
            measure(
                folder, source, measures=measures, batch=batch, size=size, options=measure_options,
                progress=count_steps(progress, name, len(source)),
            ),
        )  # fmt: skip


def grid_rows(source: Source, evaluations: Mapping[str, Evaluation]) -> list[GridRow]:
    """The first examples, each with all edits of it, and the target where there is one."""
    (height, width), rows = next(iter(evaluations.values())).images.shape[1:3], []

    def caption(name: str, evaluation: Evaluation, i: int) -> str:
        shown = next((x for x in ("success", "psnr", *evaluation.measures) if x in evaluation.measures), "")
        return f"{name}  {shown} {evaluation.measures[shown][i]:.2f}" if shown else name

    for i in range(min(PICTURED, len(source))):
        example = source[i]
        pictures = {caption(name, x, i): x.images[i] for name, x in evaluations.items()}
        if example.target is not None:
            pictures["target"] = resize_image(example.target, (height, width))
        image, mask = resize_image(example.image, (height, width)), resize_mask(example.mask, (height, width))
        rows.append(GridRow(example.instruction, image, mask, np.stack([*pictures.values()]), [*pictures]))
    return rows
