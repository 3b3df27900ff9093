"""CoCoEdit-40K: pictures, masks and instructions, without targets.

The hub has a `metadata.jsonl` and zip archives in pieces (`images_part1.zip_aa` and so on), which are joined and
unpacked beside it. White in the masks is the background.
"""

from __future__ import annotations

from pathlib import Path

from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.published.base import Published
from rcgrpo_jax.data.tables import CONTAINERS, FileTable, Table
from rcgrpo_jax.errors import UserError

TABLE = "metadata.jsonl"


def open_folder(path: Path) -> Table | None:
    """The table of a folder whose archives are unpacked; None if it is no such folder.

    Raises:
        UserError: There are archives, and the first picture of the table is not there.
    """
    file = path if path.name == TABLE else path / TABLE
    if not file.is_file():
        return None
    table = FileTable(CONTAINERS["json"], [file])
    first = next((row.cells.get("image") for row in table.rows(0, ()) if not row.fault), None)
    if not isinstance(first, str) or (file.parent / first).is_file():
        return table
    pieces = sorted({found.name.rpartition("_")[0] for found in file.parent.glob("*.zip_*")})
    archives = sorted({found.name for found in file.parent.glob("*.zip")} | set(pieces))
    if not archives:
        return table
    joined = "; ".join(f"cat {name}_* > {name}" for name in pieces)
    unpacked = f"unzip each of {', '.join(archives)}"
    raise UserError(
        f"{file.parent}: {first!r} of {TABLE} is not there, and archives are: {', '.join(archives)}.",
        f"In the folder, run {joined}; then {unpacked}." if pieces else f"In the folder, {unpacked}.",
    )


COCOEDIT = Published(
    name="cocoedit",
    hub="wyh6666/CoCoEdit-40K",
    licence="see the hub",
    form=RowForm(image="image", mask="mask", instruction="prompt", mask_form="black"),
    splits={"train": {}},
    open_other=open_folder,
    layout=f"a folder with {TABLE} and the unpacked archives",
)
