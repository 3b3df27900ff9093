"""Rows of a `metadata.jsonl`: read and checked; errors name the line, the field and what was found."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rcgrpo_jax import filetypes
from rcgrpo_jax.borders import parse_json, shorten
from rcgrpo_jax.data.example import Needs
from rcgrpo_jax.data.kinds import forms
from rcgrpo_jax.errors import UserError, nearest

REMEDY = (
    "`rcgrpo data prepare` brings Parquet, CSV, JSON and tar files into a form that is read. Or save each picture and "
    "mask as a PNG, and a metadata.jsonl beside them with a line an "
    'example, {"image": "a.png", "mask": "a_mask.png", "instruction": "Make the mug red."}.'
)
MAX_LINE = 2**24  # bytes: a line holds paths and sentences
SEPARATED = "a table of separated values"
_COCO = "a JSON document of COCO annotations"
_OPTIONAL = ("caption", "target", "flawed", "mask_polarity", "mask_value")

# What other data sets call a field; InstructPix2Pix, MagicBrush, UltraEdit and the hubs' image folders among them.
_KNOWN_AS = {
    "image": (
        "original_image", "source_img", "source_image", "src_img", "src_image", "input_image", "input_img",
        "image_file", "image_path", "img_path", "file_name", "filename", "source", "input", "src", "img", "before",
    ),
    "mask": (
        "mask_img", "mask_image", "mask_file", "mask_path", "edit_mask", "segmentation", "seg_mask", "region", "rle",
    ),
    "instruction": (
        "edit_prompt", "edit_instruction", "editing_instruction", "edit_action", "instructions", "edit", "prompt",
        "text", "command", "instruct",
    ),
    "target": (
        "edited_image", "target_img", "target_image", "output_image", "edited_img", "result", "output", "edited",
    ),
}  # fmt: skip


def likely(field: str, found: Sequence[str] | Mapping[str, Any]) -> str | None:
    """Which of the fields found is probably the wanted one: by its name in other data sets, or by its spelling."""
    return next((name for name in _KNOWN_AS.get(field, ()) if name in found), None) or nearest(field, found)


def read_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with their line numbers, from 1; blank lines are passed over.

    Lines end at "\\n" only: U+2028 and its like are legal inside JSON strings.

    Raises:
        UserError: The file is of another kind, not UTF-8, a line is no JSON object or longer than `MAX_LINE`.
    """
    check_kind(table)
    with table.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{table}, line {number}"
            if len(line) > MAX_LINE:
                raise UserError(
                    f"{where}: longer than {MAX_LINE:,} bytes; an example, with the paths of its files, was wanted.",
                    "Save pictures and masks as files, and end each line with a newline.",
                )
            text = _decode(line, where).removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")
            if text.strip():
                yield number, _object(text, where, table)


def check_kind(path: Path) -> None:
    """Raises a UserError if a file that should hold text is of another kind."""
    kind = filetypes.describe(path)
    if kind == filetypes.LFS_POINTER:
        raise UserError(f"{path}: this is {kind}; the file itself was wanted.", filetypes.LFS_REMEDY)
    if path.suffix.lower() in (".csv", ".tsv"):
        kind = kind or SEPARATED
    with path.open("rb") as file:
        head = file.read(4096)
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):  # unless it is UTF-16
        kind = kind or "binary data"
    if kind and head:
        raise UserError(f"{path}: this is {kind}; {forms()} was wanted.", REMEDY)


def read_text(path: Path) -> str:
    """The content of a text file; errors as for `read_rows`."""
    try:
        check_kind(path)
        with path.open("rb") as file:
            text = file.read(MAX_LINE + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).", "Check the path and its permissions.") from None
    if len(text) > MAX_LINE:
        raise UserError(f"{path}: longer than {MAX_LINE:,} bytes; an instruction was wanted.", "Correct the file.")
    return _decode(text, str(path)).removeprefix("\ufeff")


def _decode(text: bytes, where: str) -> str:
    """The text of UTF-8; a UserError for other bytes."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the text is not UTF-8 ({error}).", "Save it again as UTF-8.") from None


def _object(text: str, where: str, table: Path) -> dict[str, Any]:
    try:
        row = parse_json(text)
    except json.JSONDecodeError as error:
        if kind := _document(table, text):
            raise UserError(f"{table}: this is {kind}; {forms()} was wanted.", REMEDY) from None
        raise UserError(
            f"{where}: {error.msg} at column {error.colno}; a JSON object was wanted.",
            "Write one example a line, in braces and double quotes.",
        ) from None
    except ValueError as error:  # numbers of thousands of digits, endless nesting
        raise UserError(
            f"{where}: not readable as JSON ({str(error).split(';')[0]}); an object with texts was wanted.",
            "Write one example a line, in braces and double quotes.",
        ) from None
    if isinstance(row, dict):
        if _is_coco(row):
            raise UserError(f"{where}: this is {_COCO}; {forms()} was wanted.", REMEDY)
        return row
    raise UserError(
        f"{where}: a JSON {type(row).__name__} found; an object was wanted.",
        "Write {...} on each line, one example each.",
    )


def _document(table: Path, line: str) -> str | None:
    """What a file is whose `line` is no JSON: one document over many lines, or columns; None for any other file."""
    names = {name.strip(" \"'").lower() for name in re.split("[,;\t]", line[:1000])}
    if (
        not line.startswith("{")
        and len(names & {name for field, others in _KNOWN_AS.items() for name in (field, *others)}) > 1
    ):
        return SEPARATED
    if table.stat().st_size > MAX_LINE:
        return "one JSON document" if table.suffix == ".json" else None
    try:
        value = parse_json(table.read_bytes())
    except ValueError:
        return None
    return _COCO if _is_coco(value) else f"one JSON {'list' if isinstance(value, list) else 'document'}"


def _is_coco(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), list) for name in ("images", "annotations"))


def check_row(row: Mapping[str, Any], where: str, fields: Sequence[str], needs: Needs) -> None:
    """Refuses a row that lacks needed fields or has values of other types.

    Args:
        row: Of `read_rows`.
        where: Names it in messages.
        fields: The keys of image, mask and instruction.
        needs: Says whether the mask is needed.

    Raises:
        UserError: With the field, what was found and what was wanted.
    """
    needed = [field for field in fields if needs.mask or field != fields[1]]
    if missing := [field for field in needed if field not in row]:
        raise _missing(row, where, missing, fields, needs)
    for field in (*fields, "caption", "target", "mask_polarity"):
        value, is_file = row.get(field), field in (*fields[:2], "target")
        if value is None and field not in needed:
            continue
        if not isinstance(value, str):
            raise _no_text(field, value, where, is_file)
        if is_file and (value or field in needed):
            _check_file_name(field, value, where)
    if not isinstance(flawed := row.get("flawed", False), bool):
        raise UserError(f"{where}: flawed is {shorten(flawed)}; true or false was wanted.", "Write it without quotes.")
    value = mask_value_of(row)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UserError(
            f"{where}: mask_value is {shorten(value)}; a number or a text was wanted.", 'Write 15, "2,5" or "#800000".'
        )
    for field in ("flawed", "mask_polarity", "mask_value"):  # misspelt, they would be passed over
        if field not in row and (near := get_close_matches(field, row, n=1, cutoff=0.9)):
            raise UserError(f"{where}: {near[0]!r} is no field of a line; {field!r} was probably meant.", "Rename it.")
    if value != "" and row.get("mask_polarity"):
        raise UserError(
            f"{where}: both mask_polarity and mask_value found; one of them was wanted.",
            "Leave mask_polarity out: mask_value alone says what the edit region is.",
        )


def mask_value_of(row: Mapping[str, Any]) -> Any:
    """The `mask_value` of a row, empty where there is none; 0 is one."""
    return "" if (value := row.get("mask_value")) is None else value


def _missing(
    row: Mapping[str, Any], where: str, missing: Sequence[str], fields: Sequence[str], needs: Needs
) -> UserError:
    usual = dict(zip(fields, ("image", "mask", "instruction"), strict=True))
    others = [name for name in row if name not in (*fields, *_OPTIONAL)]
    meant = {near: field for field in missing if (near := likely(usual[field], others) or nearest(field, others))}
    if meant and "target" not in row and (near := next((x for x in _KNOWN_AS["target"] if x in others), None)):
        meant.setdefault(near, "target")
    absent = [field for field in missing if field not in meant.values()]
    remedies = []
    if meant:
        remedies.append(f"Did you mean {_all([f'{old!r} for {new!r}' for old, new in meant.items()])}? Rename.")
    if absent:
        remedies.append(f"Add {_all([*map(repr, absent)])} to the line.")
    if absent == [fields[1]]:
        remedies.append("`rcgrpo data mask` finds masks for examples that have none.")
    listed = ", ".join(map(shorten, row)) or "none"
    are = f"fields {_all([*map(repr, missing)])} are" if missing[1:] else f"field {missing[0]!r} is"
    who = f"; {needs.mask} needs {fields[1]!r}" if missing == [fields[1]] else ""
    return UserError(f"{where}: the {are} missing; found {listed}{who}.", " ".join(remedies))


def _all(names: Sequence[str]) -> str:
    """Names in a sentence: `a, b and c`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _no_text(field: str, value: Any, where: str, is_file: bool) -> UserError:
    kind = _annotation(value) if is_file else None
    if kind:
        return UserError(
            f"{where}: {field} is {kind}; the path of an image file was wanted.",
            f"Such values are not read: save them as PNG files, masks white inside, and name these in {field}.",
        )
    wanted = "the path of a file" if is_file else "a string"
    return UserError(f"{where}: {field} is {shorten(value)}; {wanted} was wanted.", f"Write {field} in double quotes.")


def _annotation(value: Any) -> str | None:
    """Names a mask or a picture that stands in the row itself."""
    if isinstance(value, dict):
        if {"counts", "size"} <= value.keys():
            return "a run-length encoding of COCO"
        if "bytes" in value:
            return "an image within the row, as hubs give them"
        return f"an object with {', '.join(map(shorten, value)) or 'nothing in it'}"
    if isinstance(value, list) and value:
        inner = value[0]
        if isinstance(inner, dict):
            return _annotation(inner) if "counts" in inner else "a list of objects"
        numbers = inner if isinstance(inner, list) else value
        if all(isinstance(x, (int, float)) for x in numbers):
            if inner is numbers:
                return "a list of polygons or of rows of pixels"
            return "a box of four numbers" if len(value) == 4 else "a list of numbers"
    return None


def _check_file_name(field: str, value: str, where: str) -> None:
    """Refuses texts that cannot name a file."""
    if not value.strip():
        raise UserError(f"{where}: {field} is empty; a path was wanted.", "Name the file, or leave the line out.")
    if re.match("[a-z][a-z0-9+]*://", value, re.IGNORECASE) or value.startswith("data:"):
        raise UserError(
            f"{where}: {field} is {shorten(value)}; the path of a file on this machine was wanted.",
            "Download the files, and write their paths relative to the table.",
        )
    if "\0" in value or any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in value.split("/")):
        raise UserError(
            f"{where}: {field} is {shorten(value)}, which is no file's name; a path was wanted.",
            "Save what stands there as a file, and write its path.",
        )
