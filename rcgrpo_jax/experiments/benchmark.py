"""A benchmark from edits to tables: a model's edits with and without a LoRA, and results that other editors made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from rcgrpo_jax.data.buckets import NONE, make_buckets
from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.editors.model import EditorOptions, Model
from rcgrpo_jax.editors.open import check_fits
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.benchmarks import Benchmark
from rcgrpo_jax.evaluation.benchmarks.entries import Entry, Listed, Locate
from rcgrpo_jax.evaluation.benchmarks.results import extra_pictures, measure_results, score_results
from rcgrpo_jax.evaluation.benchmarks.rows import Row, has_parquet, measures_of, write_jsonl, write_parquet
from rcgrpo_jax.evaluation.benchmarks.tables import Edits, compute_values, make_tables, remarks, subset_of, to_csv
from rcgrpo_jax.evaluation.edit import edit_all
from rcgrpo_jax.evaluation.examples import EditedBatch
from rcgrpo_jax.evaluation.measures import Measure, MeasureOptions, note
from rcgrpo_jax.evaluation.official import official_example
from rcgrpo_jax.evaluation.pictures import picture_file
from rcgrpo_jax.evaluation.tables import Table, latex, markdown, markdown_line, one_line, plain
from rcgrpo_jax.parallel import distributed
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.progress import ProgressCallback, count_steps, no_progress
from rcgrpo_jax.runs.grid import GridRow, comparison_grid
from rcgrpo_jax.runs.workdir import write_text

FILES = ("*.jsonl", "*.parquet", "table.*", "failures.json", "grid.png", "edits")  # that are written
_SHOWN = 5  # failures of an editor that are printed

Pictures = Mapping[str, UInt8[np.ndarray, "H W 3"]]  # edits by the keys of their examples


@dataclass(frozen=True)
class Measuring:
    """How edits are measured."""

    measures: Sequence[Measure]
    options: MeasureOptions
    batch: int = 8
    score: Callable[[EditedBatch], Mapping[str, np.ndarray]] = lambda edited: {}  # a judge's (`judge.scores_of`)
    check: Callable[[EditExample], None] = lambda example: None  # refuses what the judge cannot score
    without: Sequence[Measure] = ()  # what is not measured for lack of weights


class Found(NamedTuple):
    """What was found of a benchmark."""

    editors: Mapping[str, Edits]
    tables: list[Table]
    remarks: list[str]


def edit_adapters(
    model: Model,
    source: Source,
    entries: Sequence[Entry],
    adapters: Mapping[str, dict | None],
    folder: Path,
    size: tuple[int, int],
    *,
    buckets: str = NONE,
    steps: int = 28,
    guidance: float = 2.5,
    seed: int = 0,
    solver: str = "euler",
    batch: int = 8,
    dtype: str = "bfloat16",
    devices: Sequence[jax.Device] | None = None,
    progress: ProgressCallback = no_progress,
    **editor_options: Any,
) -> dict[str, Locate]:
    """Edits the examples with each adapter, into `folder / NAME`; what is there already is not made again (`edit_all`).

    Every process makes its share on its own devices, over which it spreads the weights.

    Args:
        model: The model.
        source: Where the examples are.
        entries: Which of them.
        adapters: Name -> adapter with its scale folded in; None is the base.
        folder: Gets a folder of pictures for each adapter.
        size: (height, width) in pixels that the model edits in.
        buckets: `kontext`: in the nearest of Kontext's shapes of that area instead (`edit_all`).
        steps: K.
        guidance: Guidance scale.
        seed: Of the noise, which all adapters share.
        solver: A name of `flow.solvers.SOLVERS`.
        batch: Edits at a time.
        dtype: Of computation and parameters.
        devices: Of this process; all by default.
        progress: Told of each edit of this process; the job is `edit NAME`.
        **editor_options: Of `EditorOptions`: `max_text_tokens`, `quantization`, `acd_layers`.

    Returns:
        Name -> where the edit of an example lies.
    """
    check_fits(model, make_buckets(buckets, size).largest, steps, dtype, min(batch, len(entries)))
    mesh = make_mesh({"fsdp": -1}, jax.local_devices() if devices is None else devices)
    editor = model.open(EditorOptions(dtype=dtype, **editor_options), mesh)
    indices = [entry.index for entry in entries]
    own = len(distributed.local_job_range(len(entries)))
    for name, lora in adapters.items():
        edit_all(
            editor, source, indices, folder / name, num_steps=steps, guidance=guidance, seed=seed, solver=solver,
            lora=lora, batch=batch, size=size, buckets=buckets, mesh=mesh,
            progress=count_steps(progress, f"edit {name}", own),
        )  # fmt: skip
    return {name: _locate_in(folder / name) for name in adapters}


def measure_editor(
    name: str,
    locate: Locate,
    benchmark: Benchmark,
    source: Source,
    entries: Sequence[Entry],
    how: Measuring,
    progress: ProgressCallback = no_progress,
) -> tuple[list[Row], Pictures]:
    """Measures an editor's edits: each process a share, and all get all rows.

    Returns:
        A row for each entry, in their order, and the first pictures of this process.

    Raises:
        UserError: Nothing could be measured; or as `measure_results`.
    """
    shown_first = in_turn(entries)
    own = [shown_first[i] for i in distributed.local_job_range(len(entries))]
    done = count_steps(progress, f"measure {name}", len(own))
    with distributed.raise_together():
        if benchmark.side is None:
            rows, pictures = score_results(source, own, locate, how.score, done)
        else:
            rows, pictures = measure_results(
                source, own, locate, how.measures, benchmark.side, batch=how.batch, options=how.options,
                score=how.score, progress=done,
            )  # fmt: skip
    parts = distributed.gather_texts(json.dumps(rows))
    rows = sorted(Row(*row) for part in parts for row in json.loads(part))
    if not any(row.values for row in rows):
        first = rows[0]
        reason = f"{first.file or first.id}: {first.failure}" if first.failure else "no measure fits these examples"
        raise UserError(
            f"{name}: none of {len(rows):,} edits could be measured; the first: {reason}.",
            "Name the folder of the pictures and the data that they are edits of.",
        )
    return rows, pictures


def in_turn(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with their tasks in turn, so that the first ones are of all tasks."""
    tasks: dict[str, list[Entry]] = {}
    for entry in entries:
        tasks.setdefault(entry.task, []).append(entry)
    return [entry for row in zip_longest(*tasks.values()) for entry in row if entry]


def write_benchmark(
    benchmark: Benchmark,
    source: Source,
    listed: Listed,
    measured: Mapping[str, tuple[Sequence[Row], Pictures]],
    folders: Mapping[str, Path],
    how: Measuring,
    out: Path,
) -> Found:
    """Writes what was measured into a folder, and lays out its tables.

    Args:
        benchmark: The benchmark.
        source: Where its examples are.
        listed: Which of them.
        measured: Editor -> what `measure_editor` gave.
        folders: Editor -> the folder of its results, of those whose pictures others made.
        how: How they were measured.
        out: Gets `NAME.jsonl` and `NAME.parquet` of each editor, `table.md`, `.tex` and `.csv`, `failures.json` and
            `grid.png`.

    Raises:
        UserError: A file cannot be written.
    """
    editors = {}
    for name, (rows, _) in measured.items():
        extra = extra_pictures(folders[name], benchmark, listed.entries) if name in folders else {}
        editors[name] = Edits(rows, extra)
        write_jsonl(out / f"{name}.jsonl", rows)
        if has_parquet():
            write_parquet(out / f"{name}.parquet", rows)
    values = compute_values(benchmark, editors)
    tables = make_tables(benchmark, editors, values)
    more, subset_tables = subset_of(benchmark, editors, listed.subset)
    values, tables = values + more, [*tables[:-1], *subset_tables, tables[-1]]
    said = remarks(benchmark, editors, listed.others, listed.uncaptioned)
    known = {x for edits in editors.values() for x in measures_of(edits.rows)}
    said += [note(one) for one in how.measures if one.name not in known]
    without = {one.remedy: [x.label for x in how.without if x.remedy == one.remedy] for one in how.without}
    said += [f"Not measured, since their weights are not given: {', '.join(x)}. {y}" for y, x in without.items()]
    if not has_parquet():
        said.append("NAME.parquet was not written: it takes pyarrow (`pip install -e '.[data]'`).")
    write_text(out / "table.md", f"{markdown(tables)}\n" + "\n\n".join(map(markdown_line, said)) + "\n")
    write_text(out / "table.tex", latex(tables))
    write_text(out / "table.csv", to_csv(values))
    write_text(
        out / "failures.json", json.dumps({x: _failures(edits) for x, edits in editors.items()}, indent=2) + "\n"
    )
    if rows := _grid_rows(benchmark, source, listed.entries, {name: found[1] for name, found in measured.items()}):
        save_image(out / "grid.png", comparison_grid(rows, benchmark.title))
    return Found(editors, tables, said)


def summary(found: Found, out: Path) -> str:
    """What people read of it: the tables as text, what failed, and where the files are."""
    lines = [plain(found.tables), *map(one_line, found.remarks), ""]
    for name, edits in found.editors.items():
        failed = [row for row in edits.rows if row.failure]
        lines += [one_line(f"{name}: {row.task}/{row.id}: {row.failure}") for row in failed[:_SHOWN]]
        if failed[_SHOWN:]:
            lines.append(f"{name}: {len(failed) - _SHOWN:,} more failed, listed in {out / 'failures.json'}")
        if extra := [file for files in edits.extra.values() for file in files]:
            lines.append(one_line(f"{name}: {len(extra):,} pictures of no example, the first {extra[0]}"))
    files = ", ".join(str(out / f"{name}.jsonl") for name in found.editors)
    return "\n".join([*lines, f"examples  {files}", f"table     {out / 'table.md'}, .tex and .csv"])


def _locate_in(folder: Path) -> Locate:
    return lambda entry: picture_file(folder, entry.name)


def _failures(edits: Edits) -> dict[str, Any]:
    failed = [row for row in edits.rows if row.failure]
    return {
        "failed": [{"id": x.id, "task": x.task, "file": x.file, "reason": x.failure} for x in failed],
        "of no example": dict(edits.extra),
    }


def _grid_rows(
    benchmark: Benchmark, source: Source, entries: Sequence[Entry], pictures: Mapping[str, Pictures]
) -> list[GridRow]:
    """The first examples of each task of which every editor's picture was kept."""
    rows = []
    for entry in in_turn(entries):
        shown = {name: kept[entry.key] for name, kept in pictures.items() if entry.key in kept}
        if len(shown) == len(pictures):
            example = source[entry.index]
            example = official_example(example, benchmark.side) if benchmark.side else example
            shown |= {} if example.target is None else {"target": example.target}
            rows.append(GridRow(example.instruction, example.image, example.mask, [*shown.values()], [*shown]))
    return rows
