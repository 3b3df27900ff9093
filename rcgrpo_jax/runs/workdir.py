"""The directory of a run: what must be a folder in it and what a file, and that one run at a time has it."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rcgrpo_jax.data.paths import printable
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.runs.writers import WRITERS
from rcgrpo_jax.whole import write_whole

logger = logging.getLogger(__name__)
FOLDERS = ("checkpoints", "images", *WRITERS, "profile", "cache", "compiled")  # in the directory of a run
LOCK = "lock"
CACHES = ("cache", "compiled")  # which may be there for reading alone


def make_folder(path: Path, name: str, folders: Sequence[str] = (), files: Sequence[str] = ()) -> None:
    """Makes a folder for results, and refuses one that they could not be written to.

    Args:
        path: The folder.
        name: What the user calls it.
        folders: Names in it that must be those of folders, where there is something.
        files: Names in it that must be those of files, where there is something.

    Raises:
        UserError: If it cannot be made or written to, or holds a file for a folder or a folder for a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}: {path} cannot be made ({error}).", "Choose a folder you can write to.") from None
    for inside, wanted in (dict.fromkeys(folders, "a folder") | dict.fromkeys(files, "a file")).items():
        there = path / inside
        found = "a folder" if there.is_dir() else "a file" if there.exists() else "a link to nothing"
        if os.path.lexists(there) and found != wanted:
            raise UserError(f"{name}: {there} is {found}; {wanted} was wanted.", "Move it away.")
    for written in (path, *(path / x for x in folders if x not in CACHES)):
        try:
            if written.is_dir():
                tempfile.TemporaryFile(dir=written).close()
        except OSError as error:
            raise UserError(
                f"{name}: {written} cannot be written to ({error.strerror}).", "Allow it, or choose another folder."
            ) from None


@contextmanager
def no_leftovers(path: Path) -> Iterator[None]:
    """If the block fails, removes the folders of a run that it has made and left empty, its directory among them.

    Compiled programs go too where they are all that it has left.
    """
    compiled = path / "compiled"
    places = (*(path / name for name in FOLDERS), path, *path.parents)
    made = [place for place in places if not os.path.lexists(place)]
    try:
        yield
    except BaseException:
        _remove_empty(made)
        if compiled in made and path.is_dir() and [*path.iterdir()] == [compiled]:
            shutil.rmtree(compiled, ignore_errors=True)
            _remove_empty(made)
        raise


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it is not empty, or not there
            folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Writes a file of results, whole or not at all, and makes its folder.

    What is no text, as in names of files, is written with escapes.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, printable(text))
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error}).", "Choose a folder you can write to.") from None


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps a folder to this process. The system holds the lock, not the file `lock`: it ends with the process.

    A block that fails takes the file along, where there was none before.

    Where the file system has no locks, a warning is all.

    Raises:
        UserError: If another process has it; the message names that one.
    """
    file = folder / LOCK
    is_new = not os.path.lexists(file)
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: {_holder(file)} is at work in it; one run at a time was wanted.",
            "Wait for that one or stop it, or choose another folder.",
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s): see to it that one run at a time writes to it", folder, error)
        yield
        return
    try:
        with suppress(OSError):  # a full disk
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                file.unlink()  # while it is held: whoever has opened it meanwhile sees that it is gone
        raise
    finally:
        lock.release()


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"
