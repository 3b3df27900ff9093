"""Examples from the user's own files: a `metadata.jsonl`, or folders of images, masks and instructions."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rcgrpo_jax import filetypes
from rcgrpo_jax.borders import shorten
from rcgrpo_jax.data.example import REGION, EditExample, Needs, Source, check_example
from rcgrpo_jax.data.images import read_image
from rcgrpo_jax.data.jsonl import REMEDY, SEPARATED, check_row, mask_value_of, read_rows, read_text
from rcgrpo_jax.data.kinds import SourceKind, forms, register
from rcgrpo_jax.data.masks import Marking, Polarity, check_marking, read_mask
from rcgrpo_jax.data.paths import Finder, composed, printable
from rcgrpo_jax.errors import UserError

_SHOWN = 3  # missing files that a message names before it counts the rest
_BY_SUFFIX = {".csv": SEPARATED, ".tsv": SEPARATED, ".json": "a JSON document"}
_LOOKED_AT = 1000  # most files whose kinds are looked up in a folder without examples, for the message


@dataclass(frozen=True)
class _Entry:
    """An example whose pixels have not been read."""

    name: str
    image: Path
    mask: Path | None  # None: the whole picture
    instruction: str | Path  # a path: a text file still to be read
    marking: Marking
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
        (relative to the file), the text `instruction`, and optionally `caption`, `target` (a path), `mask_polarity`,
        `mask_value` and `flawed` (true where the target is wrong on purpose). Examples are called `NUMBER-STEM` after
        the line number and the image, since images may repeat.
      - otherwise `images/NAME.*`, `masks/NAME.*` and `instructions/NAME.txt` (UTF-8), sorted by name.

    Args:
        path: The folder or the `.jsonl` file.
        polarity: The colour of the edit region in the masks, `"white"` or `"black"`; a line's `mask_polarity` wins.
        mask_value: What masks hold where the edit belongs, as for `masks.parse_mask_value`; empty: a colour, by
            `polarity`. A line's `mask_value` wins.
        image_field: The key of the image in `metadata.jsonl`.
        mask_field: The key of the mask.
        instruction_field: The key of the instruction.
        needs: Whether a line of `metadata.jsonl`, or a folder, without masks is refused; else the mask is the whole
            picture. With `each_alone` it is in any case, and files that do not exist are found when they are read.

    Raises:
        UserError: There is no such folder, nothing in it, a bad line, or files that do not exist: all are looked for
            now, so that a long run does not find the gap.
        UsageError: The polarity is neither of the two, or the mask value is malformed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        polarity: Polarity = "white",
        mask_value: str = "",
        image_field: str = "image",
        mask_field: str = "mask",
        instruction_field: str = "instruction",
        needs: Needs = REGION,
    ):
        check_marking(polarity, mask_value)
        fields = (image_field, mask_field, instruction_field)
        try:
            self._entries = _find_entries(path, (polarity, mask_value), fields, needs)
        except OSError as error:
            which = shorten(str(error.filename))
            raise UserError(
                f"{path}: cannot be read ({error.strerror}: {which}).", "Check the path and its permissions."
            ) from None

    def __len__(self) -> int:
        return len(self._entries)

    def stamp(self, index: int) -> str:
        """Changes with the example's line, and with the path, size or time of any of its files; see `Source`."""
        entry = self._entries[index]
        files = [(str(file.absolute()), (found := file.stat()).st_size, found.st_mtime_ns) for file in entry.files]
        text = None if isinstance(entry.instruction, Path) else entry.instruction
        line = [entry.name, text, entry.marking, entry.mask is None, entry.flawed, entry.target is None, entry.caption]
        return hashlib.sha256(json.dumps([line, files]).encode()).hexdigest()[:32]

    def __getitem__(self, index: int) -> EditExample:
        """Reads and checks one example; see `check_example` for what is refused."""
        entry = self._entries[index]
        if missing := _missing([entry]):
            raise UserError(f"{entry.name}: no file {missing[0]}.", "Add the file, or remove the example.")
        text, image = entry.instruction, read_image(entry.image)
        mask = np.ones(image.shape[:2], np.float32) if entry.mask is None else read_mask(entry.mask, *entry.marking)
        return check_example(
            EditExample(
                name=entry.name,
                image=image,
                mask=mask,
                instruction=read_text(text).strip() if isinstance(text, Path) else text,
                caption=entry.caption,
                target=None if entry.target is None else read_image(entry.target),
                flawed=entry.flawed,
            )
        )


@register("")
class FolderKind(SourceKind):
    """Examples in the user's own files."""

    form = "a folder, a .jsonl file (JSON Lines)"

    def open(self, path: str, marking: Marking, needs: Needs) -> Source:
        return EditFolder(path, polarity=marking[0], mask_value=marking[1], needs=needs)

    def same_examples(self, path: str, other: str) -> bool:
        """Whether they are one folder, also if one names its table."""

        def place(path: str) -> Path:
            resolved = Path(path).resolve()
            return resolved.parent if resolved.name == "metadata.jsonl" else resolved

        return place(path) == place(other)

    def folder(self, path: str) -> Path:
        return Path(path).parent if path.endswith(".jsonl") else Path(path)


def _find_entries(path: str | Path, marking: Marking, fields: tuple[str, str, str], needs: Needs) -> list[_Entry]:
    find = Finder()
    path = find(Path(path))
    if not path.exists():
        raise UserError(f"{path}: there is no such folder or file.", f"Correct the path: {forms()}.")
    table = path if path.is_file() else path / "metadata.jsonl"
    if table.is_file():
        entries = list(_from_jsonl(table, marking, fields, needs, find))
    else:
        entries = list(_from_folders(path, marking, needs))
    if not entries:
        raise _nothing(path)
    if not needs.each_alone and (missing := _missing(entries)):
        listed = ", ".join(str(file) for file in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UserError(
            f"{path}: {len(missing)} of the files that its examples need do not exist: {listed}{more}.",
            "Add the files, or remove their examples.",
        )
    return entries


def _missing(entries: Iterable[_Entry]) -> list[Path]:
    """The files of examples that are not there, or are no files."""
    return [file for entry in entries for file in entry.files if not file.is_file()]


def _from_jsonl(
    table: Path, marking: Marking, fields: tuple[str, str, str], needs: Needs, find: Finder
) -> Iterator[_Entry]:
    for number, row in read_rows(table):
        where = f"{table}, line {number}"
        if needs.each_alone:
            row = {field: x for field, x in row.items() if field not in (fields[1], "mask_polarity", "mask_value")}
        check_row(row, where, fields, needs)
        image, mask, instruction = (row.get(field) for field in fields)
        target = row.get("target")
        yield _Entry(
            name=printable(f"{number:05d}-{Path(image).stem}"),
            image=find(table.parent / image),
            mask=find(table.parent / mask) if mask else None,
            instruction=instruction,
            marking=_marking(row, where, marking),
            caption=row.get("caption"),
            target=find(table.parent / target) if target else None,
            flawed=row.get("flawed", False),
        )


def _marking(row: Mapping[str, Any], where: str, default: Marking) -> Marking:
    """How a row's mask marks its region: as the row says, or else as the whole folder's do."""
    polarity, value = row.get("mask_polarity"), str(mask_value_of(row))
    found = (polarity or "white", value) if polarity or value else default
    check_marking(*found, (f"{where}: mask_polarity", f"{where}: mask_value"))
    return found


def _from_folders(root: Path, marking: Marking, needs: Needs) -> Iterator[_Entry]:
    suffixes = Image.registered_extensions()
    images = _by_stem(root / "images", suffixes)
    masks = {} if needs.each_alone else _by_stem(root / "masks", suffixes)
    texts = _by_stem(root / "instructions", (".txt",))
    for name in sorted(images.keys() | masks.keys() | texts.keys()):
        yield _Entry(
            name=printable(name),
            image=images.get(name, root / "images" / f"{name}.*"),  # a name that exists nowhere: reported as missing
            mask=masks.get(name, root / "masks" / f"{name}.*" if masks or needs.mask else None),
            instruction=texts.get(name, root / "instructions" / f"{name}.txt"),
            marking=marking,
        )


def _by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Maps names of a folder's visible files, in Unicode's form C, to their paths; other suffixes are passed over."""
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("[!.]*")):
        if file.suffix.lower() not in suffixes:
            continue
        stem = composed(file.stem)
        if stem in files:
            names = [files[stem].name, file.name]
            if composed(names[0]) == composed(names[1]):
                names = [f"{name!a}" for name in names]
            raise UserError(
                f"{folder}: both {names[0]} and {names[1]} found; one file a name was wanted.",
                "Remove or rename one of them.",
            )
        files[stem] = file
    return files


def _nothing(path: Path) -> UserError:
    """The error for a folder without examples; it names what else is there."""
    layouts = "metadata.jsonl, or images/, masks/ and instructions/, was wanted"
    if (path / "dataset_info.json").is_file() and (path / "features.json").is_file():
        return UserError(
            f"{path}: this is a TFDS dataset; {layouts}.", f"Write tfds:{path}, or tfds:{path}@SPLIT, for the path."
        )
    if tables := [file.name for file in sorted(path.glob("*.jsonl")) if file.name != "metadata.jsonl"]:
        return UserError(
            f"{path}: no examples found; {layouts}; found {', '.join(tables[:_SHOWN])}.",
            f"Name the table itself: {path / tables[0]}.",
        )
    kinds = defaultdict(list)
    for file in islice(chain(sorted(path.glob("[!.]*")), sorted(path.glob("[!.]*/[!.]*"))), _LOOKED_AT):
        kind = filetypes.describe(file) or _BY_SUFFIX.get(file.suffix.lower())
        if kind and not kind.endswith(("picture", "empty file")):
            kinds[kind].append(file.name)
    found = [f"{kind}, {names[0]}, and {len(names) - 1} more such" for kind, names in kinds.items()]
    found = [words.removesuffix(", and 0 more such") for words in found]
    if not found:
        return UserError(f"{path}: no examples found; {layouts}.", "Lay the folder out in one of the two ways.")
    remedy = filetypes.LFS_REMEDY if filetypes.LFS_POINTER in kinds else REMEDY
    return UserError(f"{path}: no examples found; {layouts}; found {'; '.join(found[:_SHOWN])}.", remedy)
