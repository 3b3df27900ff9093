"""Files that are whole or not there, however the process that writes them ends."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".partial"  # of what a kill may leave behind


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a name beside `path` to write a file under; at the end of the block it takes the place of `path`.

    It is on disk by then. A block that fails leaves `path` as it was and nothing beside it. Several processes may write
    the same file: one of them is the last.

    Args:
        path: Of the file. A link is followed.

    Raises:
        OSError: The file cannot take its place.
    """
    place = Path(os.path.realpath(path))
    partial = place.with_name(f".{uuid.uuid4().hex}{SUFFIX}")  # short, whatever the file's own name
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, place)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Removes what killed processes left of `whole_file` in a folder that this one has to itself."""
    for file in folder.glob(f".{'[0-9a-f]' * 32}{SUFFIX}"):
        file.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text in UTF-8 by `whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
