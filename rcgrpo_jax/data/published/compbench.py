"""CompBench (arXiv 2505.12200): a benchmark of local edits with masks, 640 x 640.

It comes as Parquet files of the hub, or as the folders that its authors' `download_from_hf.py` makes of them. Pictures
of `add`, `remove` and `replace` lie in `tasks/TASK/{input_image,edited_image,mask}/` under the `image_path` of
`tasks/TASK/metadata.json`. The folders of other tasks have other layouts and are not read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.published.base import Published
from rcgrpo_jax.data.tables import CONTAINERS, FileTable, Row, Table

LOCAL = {"add": 982, "remove": 1331, "replace": 152}  # the tasks of local editing, with the rows that the paper counts
PICTURES = ("input_image", "edited_image", "mask")
TABLE = "metadata.json"


class TaskFolders:
    """The rows of the folders of tasks, with the columns that the hub's files have."""

    columns = ("task", "image_path", "instruction", "caption", *PICTURES)

    def __init__(self, files: list[Path]):
        self.files = files
        self._tables = [FileTable(CONTAINERS["json"], [file]) for file in files]

    def __len__(self) -> int:
        return sum(map(len, self._tables))

    def rows(self, start: int, columns: Collection[str]) -> Iterator[Row]:
        for file, table in zip(self.files, self._tables, strict=True):
            task = file.parent.name
            for row in table.rows(start, columns):
                yield _with_pictures(replace(row, where=f"{task}/{row.where}"), task)
            start = max(0, start - len(table))


def _with_pictures(row: Row, task: str) -> Row:
    """Adds the task and the paths of the pictures; a mask that is not there is none, as in the hub's files."""
    path = row.cells.get("image_path")
    if row.fault or not isinstance(path, str) or not path:
        return replace(row, fault=row.fault or "no image_path")
    paths = {name: f"{name}/{path}" for name in PICTURES}
    if not (row.folder / paths["mask"]).exists():
        del paths["mask"]
    return replace(row, cells={**row.cells, **paths, "task": task})


def open_folders(path: Path) -> Table | None:
    """The folders of tasks in a folder, or in its `tasks`; None if there are none."""
    for root in (path, path / "tasks"):
        if files := [root / task / TABLE for task in LOCAL if (root / task / TABLE).is_file()]:
            return TaskFolders(files)
    return None


COMPBENCH = Published(
    name="compbench",
    hub="BohanJia/CompBench",
    licence="cc-by-4.0",
    form=RowForm(
        image="input_image",
        mask="mask",
        instruction="instruction",
        target="edited_image",
        caption="caption",
        task="task",
        id=("task", "image_path"),
        tasks=tuple(LOCAL),
    ),
    splits={"train": LOCAL, "multi_turn": {}},
    tasks=(
        *LOCAL, "implicit_reasoning", "location", "action", "view", "multi_object_add", "multi_object_remove",
        "multi_turn_add", "multi_turn_remove",
    ),
    open_other=open_folders,
    layout="the Parquet files of the hub, or the folder tasks/ of its downloader",
)  # fmt: skip
