"""`rcgrpo data prepare NAME --from DIR --out DIR`: a published data set, or a table of one's own, as ArrayRecord."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from absl import flags

from rcgrpo_jax.borders import read_object
from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import leave_devices_alone
from rcgrpo_jax.cli.paths import check_apart, check_name, path_flag
from rcgrpo_jax.data.mask_forms import MASK_FORMS, RUNS
from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.prepare.run import REPORT, prepare, publish, settings_of, tidy
from rcgrpo_jax.data.prepare.sets import NEEDED, DataSet, check_tasks, fit_form, open_own, open_published
from rcgrpo_jax.data.published import PUBLISHED
from rcgrpo_jax.data.tables import CONTAINERS
from rcgrpo_jax.errors import UsageError, UserError, nearest
from rcgrpo_jax.progress import Jobs
from rcgrpo_jax.runs.workdir import LOCK, hold, make_folder

ABOUT = f"""Writes a data set as ArrayRecord files, which data.path takes as tfds:OUT. After a stop, run it again.

NAME is a published data set as it was downloaded, or the kind of your own files, whose columns the flags name.
Published data sets: {", ".join(PUBLISHED)}.
Kinds of files: {", ".join(CONTAINERS)}."""
COLUMNS = {
    "image": "column of the source picture",
    "mask": "column of the mask",
    "instruction": "column of the instruction",
    "target": "column of the edited picture, if there is one",
    "caption": "column of the description of the edited picture",
    "task": "column of the kind of edit",
}
_MASK_FORM = "what the edit region is in a mask; of your own files white by default, of published sets theirs"
_LINES = 100  # of progress where there is no terminal


def _flags(values: flags.FlagValues) -> None:
    path_flag("from", "folder or file to read", values)
    path_flag("out", "folder to write; a data set that is there is not written again", values)
    flags.DEFINE_string("split", None, "split to read; of published sets the first by default", flag_values=values)
    flags.DEFINE_list("tasks", None, "tasks to keep; of compbench add,remove,replace by default", flag_values=values)
    for field, about in COLUMNS.items():
        flags.DEFINE_string(field, None, about, flag_values=values)
    flags.DEFINE_list("id", None, "columns whose values, joined by -, name an example", flag_values=values)
    flags.DEFINE_enum("mask_form", None, [*MASK_FORMS, RUNS], _MASK_FORM, flag_values=values)
    flags.DEFINE_bool("resize_masks", None, "bring masks of the picture's shape to its size", flag_values=values)
    flags.DEFINE_bool("keep_full_masks", None, "keep masks that are the whole picture", flag_values=values)
    flags.DEFINE_integer(
        "workers", min(8, os.cpu_count() or 1), "threads that decode pictures", 1, 256, flag_values=values
    )


def run(argv: list[str]) -> None:
    values, (name,) = parse("data prepare", ABOUT, argv, _flags, positional=("name",), required=("from", "out"))
    data, form = _open(name, values)
    check_name("--out", values.out)
    out = Path(os.path.realpath(values.out))
    folder = values["from"].value if os.path.isdir(values["from"].value) else None  # beside a file is place enough
    check_apart("--out", out, {"--from": folder})
    leave_devices_alone()
    if _is_finished(out, data, form):
        tidy(out)
        print(f"{values.out} is finished; {REPORT} in it says what it holds.\n\ntfds:{values.out}")
        return
    partial = out.with_name(f"{out.name}.incomplete")
    make_folder(partial, "--out")
    try:
        with hold(partial), Jobs(_LINES) as progress:
            report = prepare(data, form, partial, values.workers, progress)
            publish(partial, out)
            (out / LOCK).unlink(missing_ok=True)
    except OSError as error:
        problem = f"--out: {partial} is not finished ({error})."
        raise UserError(problem, "Make room or mend the file, and run it again: it goes on.") from None
    print("\n".join([*report.lines(), "", f"tfds:{values.out}"]))


def _open(name: str, values: flags.FlagValues) -> tuple[DataSet, RowForm]:
    """The data set, and the form of its rows: the published one, with what the flags change of it."""
    names = (*PUBLISHED, *CONTAINERS)
    if name not in names:
        near = nearest(name, names)
        raise UsageError(
            f"unknown data set {name!r}; {', '.join(names)} was wanted." + (f" Did you mean {near!r}?" if near else ""),
            "Name the kind of your files, and their columns by flags.",
        )
    fields = (*COLUMNS, "id", "mask_form", "resize_masks", "keep_full_masks", "tasks")
    given = {field: values[field].value for field in fields if values[field].present}
    given |= {field: tuple(given[field]) for field in ("id", "tasks") if field in given}
    given |= {"tasks": tuple(task.lower() for task in given["tasks"])} if "tasks" in given else {}
    path, split, published = Path(values["from"].value), values.split or "", PUBLISHED.get(name)
    missing = [f"--{field}" for field in NEEDED if field not in given]
    if missing and not published:
        raise UsageError(f"missing {', '.join(missing)}.", f"Name the columns of the {name} files.")
    check_tasks(given.get("tasks", ()), published)
    form = replace(published.form, **given) if published else RowForm(**given)
    if form.tasks and not form.task:
        raise UsageError("--tasks: no column of the task is known.", "Name it by --task.")
    data = open_published(published, path, split) if published else open_own(name, path, split)
    form, notes = fit_form(form, data.table, given)
    return replace(data, notes=[*data.notes, *notes]), form


def _is_finished(out: Path, data: DataSet, form: RowForm) -> bool:
    """Whether a folder holds this data set already; refuses one that holds anything else."""
    if out.is_mount():  # the finished folder takes its place, and what is unfinished lies beside it
        raise UserError(
            f"--out: {out} is where a disk is mounted; a folder in it was wanted.", f"Name {out / data.name}."
        )
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    remedy = "Choose another folder, or remove it."
    if not (out / REPORT).is_file():
        raise UserError(f"--out: {out} holds something else; a new folder was wanted.", remedy)
    before = read_object(out / REPORT, remedy).get("settings")
    if before != settings_of(data, form):
        raise UserError(f"--out: {out} was made with other settings or files than these.", remedy)
    return True
