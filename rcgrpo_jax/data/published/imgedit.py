"""ImgEdit-Bench (arXiv 2505.20275), its basic suite: 737 instructions of nine kinds, without masks.

The hub has a `Benchmark.tar`. Its folder `singleturn` holds the pictures by category, and the table: an object of
objects, `{KEY: {"id": "animal/000342021.jpg", "prompt": ..., "edit_type": ...}}`. The authors' repository has the same
table as `basic_edit.json`.
"""

from __future__ import annotations

from pathlib import Path

from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.published.base import Published
from rcgrpo_jax.data.tables import CONTAINERS, FileTable, Table
from rcgrpo_jax.data.tables.documents import KEY

TASKS = {
    "add": 95, "adjust": 94, "extract": 117, "replace": 92, "remove": 86, "background": 94, "style": 100,
    "compose": 23, "action": 36,
}  # fmt: skip
TABLES = ("singleturn.json", "basic_edit.json")
FOLDERS = (".", "singleturn", "Benchmark/singleturn")  # in which the table may lie, beside its pictures


def open_folder(path: Path) -> Table | None:
    """The table of a folder, or the file itself; None if there is none."""
    files = [path] if path.is_file() else [path / folder / name for folder in FOLDERS for name in TABLES]
    return next((FileTable(CONTAINERS["json"], [file]) for file in files if file.is_file()), None)


IMGEDIT = Published(
    name="imgedit",
    hub="sysuyy/ImgEdit",
    licence="see the hub",
    form=RowForm(image="id", mask="", instruction="prompt", task="edit_type", id=(KEY,)),
    splits={"basic": TASKS},
    tasks=tuple(TASKS),
    open_other=open_folder,
    containers=(),
    layout=f"the unpacked Benchmark.tar, with {TABLES[0]} or {TABLES[1]} beside the folders of its pictures,",
)
