"""Examples from the user's own files: a `metadata.jsonl`, or folders of images, masks and instructions."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rcgrpo_jax.data.example import EditExample, check_example
from rcgrpo_jax.data.images import Polarity, check_polarity, read_image, read_mask
from rcgrpo_jax.errors import UserError, nearest

_SHOWN = 3  # missing files that a message names before it counts the rest


@dataclass(frozen=True)
class _Entry:
    """An example whose pixels have not been read."""

    name: str
    image: Path
    mask: Path | None  # None: the whole picture
    instruction: str | Path  # a path: a text file still to be read
    polarity: Polarity
    caption: str | None = None
    target: Path | None = None
    flawed: bool = False

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.image, self.mask, self.instruction, self.target) if isinstance(file, Path)]


class EditFolder:
    """A random-access source of the examples in a folder; pixels are read when an example is asked for.

    Two layouts are known:
      - `metadata.jsonl` in the folder, or any `.jsonl` file: a JSON object a line with the paths `image` and `mask`
        (relative to the file), the text `instruction`, and optionally `caption`, `target` (a path), `mask_polarity` and
        `flawed` (true where the target is wrong on purpose). Examples are called `NUMBER-STEM` after the line number
        and the image, since images may repeat.
      - otherwise `images/NAME.*`, `masks/NAME.*` and `instructions/NAME.txt` (UTF-8), sorted by name.

    Args:
        path: The folder or the `.jsonl` file.
        polarity: The colour of the edit region in the masks, `"white"` or `"black"`; a line's `mask_polarity` wins.
        image_field: The key of the image in `metadata.jsonl`.
        mask_field: The key of the mask.
        instruction_field: The key of the instruction.
        needs_mask: Whether a line of `metadata.jsonl` without a mask is refused; else its mask is the whole picture.

    Raises:
        UserError: There is no such folder, nothing in it, a bad line, or files that do not exist: all are looked for
            now, so that a long run does not find the gap.
        UsageError: The polarity is neither of the two.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        polarity: Polarity = "white",
        image_field: str = "image",
        mask_field: str = "mask",
        instruction_field: str = "instruction",
        needs_mask: bool = True,
    ):
        path = Path(path)
        check_polarity(polarity)
        if not path.exists():
            raise UserError(f"{path}: there is no such folder or file.", "Correct the path to the examples.")
        table = path if path.is_file() else path / "metadata.jsonl"
        if table.is_file():
            self._entries = _from_jsonl(table, polarity, (image_field, mask_field, instruction_field), needs_mask)
        else:
            self._entries = _from_folders(path, polarity)
        if not self._entries:
            raise UserError(
                f"{path}: no examples found; metadata.jsonl, or images/, masks/ and instructions/, was wanted.",
                "Lay the folder out in one of the two ways.",
            )
        missing = [file for entry in self._entries for file in entry.files if not file.is_file()]
        if missing:
            listed = ", ".join(str(file) for file in missing[:_SHOWN])
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise UserError(
                f"{path}: {len(missing)} of the files that its examples need do not exist: {listed}{more}.",
                "Add the files, or remove their examples.",
            )

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> EditExample:
        """Reads and checks one example; see `check_example` for what is refused."""
        entry = self._entries[index]
        text, image = entry.instruction, read_image(entry.image)
        mask = np.ones(image.shape[:2], np.float32) if entry.mask is None else read_mask(entry.mask, entry.polarity)
        return check_example(
            EditExample(
                name=entry.name,
                image=image,
                mask=mask,
                instruction=_read_text(text).strip() if isinstance(text, Path) else text,
                caption=entry.caption,
                target=None if entry.target is None else read_image(entry.target),
                flawed=entry.flawed,
            )
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the text is not UTF-8 ({error}).", "Save it again as UTF-8.") from None


def _from_jsonl(table: Path, polarity: Polarity, fields: tuple[str, str, str], needs_mask: bool) -> list[_Entry]:
    # Split at "\n" only: U+2028 and its like are legal inside JSON strings, but `splitlines` breaks there.
    lines = enumerate(_read_text(table).split("\n"), start=1)
    return [_from_line(table, number, line, polarity, fields, needs_mask) for number, line in lines if line.strip()]


def _from_line(
    table: Path, number: int, line: str, polarity: Polarity, fields: tuple[str, str, str], needs_mask: bool
) -> _Entry:
    where = f"{table}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: {error.msg} at column {error.colno}; a JSON object was wanted.",
            "Write one example a line, in braces and double quotes.",
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a JSON {type(row).__name__} found; an object was wanted.", "Write {...} on each line."
        )

    needed = [field for field in fields if needs_mask or field != fields[1]]
    for field in needed:
        if field not in row:
            near = nearest(field, row)
            raise UserError(
                f"{where}: the field {field!r} is missing; found {', '.join(map(repr, row)) or 'none'}.",
                f"Did you mean {near!r}? Rename it." if near else f"Add {field!r} to the line.",
            )
    for field in (*fields, "caption", "target", "mask_polarity"):
        value = row.get(field)
        if not isinstance(value, str) and not (value is None and field not in needed):
            raise UserError(f"{where}: {field} is {value!r}; a string was wanted.", f"Write {field} in double quotes.")
        if field in needed[:-1] and not value.strip():
            raise UserError(f"{where}: {field} is empty; a path was wanted.", "Name the file, or leave the line out.")
    if not isinstance(flawed := row.get("flawed", False), bool):
        raise UserError(f"{where}: flawed is {flawed!r}; true or false was wanted.", "Write it without quotes.")

    image, mask, instruction = (row.get(field) for field in fields)
    override, target = row.get("mask_polarity") or polarity, row.get("target")
    check_polarity(override, f"{where}: mask_polarity")
    return _Entry(
        name=f"{number:05d}-{Path(image).stem}",
        image=table.parent / image,
        mask=table.parent / mask if mask else None,
        instruction=instruction,
        polarity=override,
        caption=row.get("caption"),
        target=table.parent / target if target else None,
        flawed=flawed,
    )


def _from_folders(root: Path, polarity: Polarity) -> list[_Entry]:
    suffixes = Image.registered_extensions()
    images = _by_stem(root / "images", suffixes)
    masks = _by_stem(root / "masks", suffixes)
    texts = _by_stem(root / "instructions", (".txt",))
    return [
        _Entry(
            name=name,
            image=images.get(name, root / "images" / f"{name}.*"),  # a name that exists nowhere: reported as missing
            mask=masks.get(name, root / "masks" / f"{name}.*"),
            instruction=texts.get(name, root / "instructions" / f"{name}.txt"),
            polarity=polarity,
        )
        for name in sorted(images.keys() | masks.keys() | texts.keys())
    ]


def _by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Maps the names of a folder's visible files to their paths; files of other suffixes are passed over."""
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("[!.]*")):
        if file.suffix.lower() not in suffixes:
            continue
        if file.stem in files:
            raise UserError(
                f"{folder}: both {files[file.stem].name} and {file.name} found; one file a name was wanted.",
                "Remove or rename one of them.",
            )
        files[file.stem] = file
    return files
