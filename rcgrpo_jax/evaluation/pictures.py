"""A folder of edits: a PNG named by each example, and, where this package made them, what they are edits of.

    settings.json        once for all: settings as in `Evaluation.settings`, and the adapter's fingerprint
    NAME.png             the edit of the example of that name, lossless
    edits-K-of-N.jsonl   by each call that shares the work: a line an edit, after its picture is there

Edits of other programs are the PNG files alone.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from jaxtyping import UInt8
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform, parse_json, read_object, shorten
from rcgrpo_jax.data.images import read_image, save_image
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.result import LATER, Count, Origin, Settings

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"
LONGEST_NAME = 255  # bytes of a file's name on common file systems
_LINES = "edits-*-of-*.jsonl"
_ANOTHER = "Use another folder, or put the values back."
_WRITE = "Choose a folder you can write to, on a disk with free space."


class _Line(TypedDict):
    """What is said of an edit beside its picture."""

    __pydantic_config__ = STRICT
    name: str  # of the example
    index: Count  # in the source
    instruction: str
    file: str
    acd: float | None  # R_acd of the rollout; None where it is not finite


class _Common(TypedDict):
    """What is said once of all edits."""

    __pydantic_config__ = STRICT
    settings: Settings
    origin: Origin


def picture_file(folder: Path, name: str) -> Path:
    """The PNG of an example. A name that would lead elsewhere has `%2F` for a slash, as in an address."""
    return folder / (re.sub(r"[/\\\0]|^\.", lambda found: f"%{ord(found[0]):02X}", name) + ".png")


def check_names(names: Sequence[str]) -> None:
    """Refuses examples that share a picture, or whose name makes none.

    Raises:
        UserError: Two have one name, or a name is too long.
    """
    first: dict[Path, int] = {}
    for position, name in enumerate(names):
        if (size := len(os.fsencode(picture_file(Path(), name).name))) > LONGEST_NAME:
            raise UserError(
                f"example {position}, {name[:40]}...: a name of {size} bytes found; {LONGEST_NAME} at most were "
                "wanted.",
                "Give its image a shorter name.",
            )
        other = first.setdefault(picture_file(Path(), name), position)
        if other != position:
            raise UserError(
                f"{name}: the examples {other} and {position} have this name; a name for each picture was wanted.",
                "Rename one of them in the data.",
            )


def read_picture(folder: Path, name: str, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """The edit of an example.

    Args:
        folder: The folder of edits.
        name: Of the example.
        size: Its (height, width).

    Raises:
        UserError: There is no such picture, it cannot be read, or it has another size.
    """
    file = picture_file(folder, name)
    if not os.path.isfile(file):  # False for a name that no file can have, too
        count = sum(not file.name.startswith(".") for file in folder.glob("*.png"))
        raise UserError(
            f"{file}: no such file; the edit of the example {name} was wanted. The folder has {count} .png files.",
            "Save the edit of every example as NAME.png, NAME being the example's.",
        )
    picture, (height, width) = read_image(file), size
    if picture.shape[:2] != (height, width):
        found = f"{picture.shape[1]}x{picture.shape[0]}"
        raise UserError(
            f"{file}: {found} pixels found; {width}x{height} were wanted, as the examples are measured in.",
            f"Make all edits alike; if all are {found}, measure in that size: --size {found}.",
        )
    return picture


def claim(folder: Path, settings: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Says in a folder what its edits are of, or refuses one whose edits were made otherwise.

    Raises:
        UserError: Naming what differs; or the folder holds pictures of another origin, or cannot be written.
    """
    file, wanted = folder / SETTINGS, {"settings": dict(settings), "origin": dict(origin)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(folder.glob("*.png")):
                raise UserError(
                    f"{folder}: pictures without {SETTINGS} found; a new folder was wanted, or one of such edits.",
                    "Choose another folder.",
                )
            partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")  # another call may write the same file
            partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            try:
                os.link(partial, file)
                partial.unlink()
            except FileExistsError:  # another call was first: what it wrote counts
                partial.unlink()
            except OSError:  # a file system without links
                partial.replace(file)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error}).", _WRITE) from None
    there = read_common(folder)
    differing = [
        f"{name}: there {shorten(there[group].get(name), 20)}, now {shorten(wanted[group].get(name), 20)}"
        for group in wanted
        for name in {**there[group], **wanted[group]}
        if there[group].get(name) != wanted[group].get(name)
    ]
    if differing:
        raise UserError(f"{folder}: edits made otherwise found: {'; '.join(differing)}.", _ANOTHER)


def read_common(folder: Path) -> dict[str, Any] | None:
    """The settings and the origin of all edits in a folder; None where the pictures are of another program.

    Raises:
        UserError: There is no such folder, or what is said in it is damaged.
    """
    file = folder / SETTINGS
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; one with pictures was wanted.", "Correct the path.")
    if not file.exists():
        return None
    found = read_object(file, _ANOTHER)
    conform(found, _Common, str(file), _ANOTHER)
    return found | {"settings": LATER | found["settings"]}


def size_of_edits(folders: Iterable[Path]) -> tuple[int, int] | None:
    """(height, width) of the edits in the first folder that says so; None where none does.

    Raises:
        UserError: As `read_common`.
    """
    return next((size for folder in folders if (size := size_in(folder, read_common(folder)))), None)


def size_in(folder: Path, common: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """(height, width) of all edits in a folder, by what `read_common` found; None where that is nothing.

    Raises:
        UserError: They have several shapes.
    """
    if common and "buckets" in common["settings"]:
        raise UserError(
            f"{folder}: edits in the shapes of {common['settings']['buckets']} found; edits of one size were wanted.",
            "Edit without --buckets; `rcgrpo evaluate --benchmark` alone measures several shapes.",
        )
    return tuple(common["settings"]["size"]) if common else None


def read_lines(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> the line of its edit. What a kill tore off at the end of a file is left out.

    Raises:
        UserError: A file cannot be read, or a whole line is none of an edit.
    """
    lines = {}
    for file in sorted(folder.glob(_LINES)):
        try:
            whole = file.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error}).", "Allow it.") from None
        for number, text in enumerate(whole, start=1):
            where, remedy = f"{file}, line {number}", "Delete that line: the edit is made again."
            try:
                line = parse_json(text)
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}).", remedy) from None
            conform(line, _Line, where, remedy)
            lines[line["name"]] = line
    return lines


def edited_names(folder: Path, indices: Mapping[str, int]) -> set[str]:
    """The names whose edits are there, with their lines.

    Args:
        folder: The folder of edits.
        indices: Name -> index of the example, on which the noise depends.

    Raises:
        UserError: An edit was made of the same example at another index, or a line is damaged.
    """
    made = set()
    for name, line in read_lines(folder).items():
        if name in indices and line["index"] != indices[name]:
            raise UserError(
                f"{folder}: {name} was edited as example {line['index']}, with its noise; {indices[name]} was wanted.",
                _ANOTHER,
            )
        if picture_file(folder, name).is_file():
            made.add(name)
    return made


def _keep(file: BinaryIO, path: Path) -> None:
    """Keeps an open file to this process, until it is closed; where the file system has no locks, that is all.

    Raises:
        UserError: Another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path}: another process is making these edits; one at a time was wanted.",
            "Wait for that one or stop it, or choose another folder.",
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that one process at a time writes it", path, error)


class PictureLog:
    """Writes edits into a folder, each with its line: a picture counts once its line is whole.

    A share has one process at a time: two would write one file under two names.

    Args:
        folder: The folder of edits, which `claim` has made.
        share: Which of the calls that share the work this is.
        count: How many there are.
    """

    def __init__(self, folder: Path, share: int, count: int):
        self._folder, self._path = folder, folder / f"edits-{share}-of-{count}.jsonl"

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("a+b")
            _keep(self._file, self._path)
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)  # without what a kill tore off
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error}).", _WRITE) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(
        self, name: str, index: int, instruction: str, picture: UInt8[np.ndarray, "H W 3"], acd: float
    ) -> None:  # fmt: skip
        """Writes an edit, on disk when this returns.

        Raises:
            UserError: It cannot be written.
        """
        file = picture_file(self._folder, name)
        partial = self._path.with_name(f".{self._path.stem}.png")
        save_image(partial, picture)
        line = {
            "name": name, "index": index, "instruction": instruction, "file": file.name,
            "acd": acd if math.isfinite(acd) else None,
        }  # fmt: skip
        try:
            os.replace(partial, file)
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error}).", _WRITE) from None
