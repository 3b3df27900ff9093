"""Rows of a data set as examples: which column is what, how masks are stored, and which rows are no examples."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image

from rcgrpo_jax.data.example import MIN_SIDE, EditExample, check_example
from rcgrpo_jax.data.images import as_rgb
from rcgrpo_jax.data.mask_forms import MASK_FORMS, RUNS, decode_runs, fit_mask
from rcgrpo_jax.data.paths import Finder, printable
from rcgrpo_jax.data.prepare.cells import Unusable, decode, read_content, read_text
from rcgrpo_jax.data.records import encode_png
from rcgrpo_jax.data.tables import Row
from rcgrpo_jax.errors import UserError

_LONGEST_NAME = 120  # characters: examples name files
_FULL = 0.94  # a mask that is nowhere below is the whole picture: what lossy files leave of white
_PNG_DEPTH = 24  # place in a PNG file of the bits of a sample
CHANGED = 24  # of 255: by which a pixel of the target must differ from the source's, in one channel, to count
NOT_CHOSEN = "the task was not chosen"


@dataclass(frozen=True)
class RowForm:
    """How the rows of a data set become examples. Columns that are empty are not read."""

    image: str  # column of the source
    mask: str  # empty: there are no masks, and the whole picture is the region
    instruction: str
    target: str = ""
    caption: str = ""  # of the edited image
    task: str = ""
    id: tuple[str, ...] = ()  # joined by "-"; empty: the number of the row
    mask_form: str = "white"  # of `mask_forms.MASK_FORMS`, or `mask_forms.RUNS`
    resize_masks: bool = False  # whether masks of the picture's shape are brought to its size; else they are skipped
    keep_full_masks: bool = False  # whether masks that are white throughout are kept; else they are skipped
    tasks: tuple[str, ...] = ()  # that are kept; empty: all

    @property
    def columns(self) -> dict[str, str]:
        """What a column is for -> its name; of those that are read."""
        fields = ("image", "mask", "instruction", "target", "caption", "task")
        found = {field: getattr(self, field) for field in fields if getattr(self, field)}
        return found | {f"id {number}": name for number, name in enumerate(self.id)}

    def without(self, field: str) -> RowForm:
        """The form without one of its columns."""
        if field.startswith("id "):
            return replace(self, id=())
        return replace(self, **{field: ""})


class Prepared(NamedTuple):
    """An example that is ready to be written."""

    where: str  # the row
    example: EditExample
    id: str
    pictures: dict[str, bytes]  # PNG or JPEG, by field
    inside: float | None  # share of the target's change that the mask covers; None: no target, or no change


class Skipped(NamedTuple):
    """A row that is left out."""

    where: str
    id: str
    reason: str
    detail: str
    task: str = ""


def read_row(row: Row, number: int, form: RowForm, find: Finder) -> Prepared | Skipped:
    """Makes an example of a row, or says why there is none.

    Args:
        row: Of a table.
        number: Of the row in the table, from 0.
        form: How the rows are read.
        find: Finds files whatever the normal form of their names.
    """
    identifier = task = ""
    try:
        if row.fault:
            raise Unusable("the row cannot be read", row.fault)
        identifier = "-".join(read_text(row.cells.get(column), "id") for column in form.id)
        task = read_text(row.cells.get(form.task), "task").lower() if form.task else ""
        if form.tasks and task not in form.tasks:
            raise Unusable(NOT_CHOSEN)
        return _prepare(row, identifier or f"{number:08d}", task, form, find)
    except Unusable as skip:
        return Skipped(*map(printable, (row.where, identifier, skip.reason, skip.detail, task)))


def _prepare(row: Row, identifier: str, task: str, form: RowForm, find: Finder) -> Prepared:
    instruction = read_text(row.cells.get(form.instruction), "instruction")
    if not instruction:
        raise Unusable("the instruction is blank")
    pictures, pixels = {}, {}
    for field, column in (("image", form.image), ("target", form.target)):
        content = read_content(row.cells.get(column) if column else None, field, row.folder, find)
        if content is not None:
            picture = decode(content, field)
            pixels[field] = _as_rgb(picture, field)
            pictures[field] = content if _is_plain(picture, content) else encode_png(pixels[field])
    if "image" not in pixels:
        raise Unusable("no image")
    source, target = pixels["image"], pixels.get("target")
    if min(source.shape[:2]) < MIN_SIDE:
        raise Unusable(f"the image has a side of less than {MIN_SIDE} pixels", _size(source))
    if target is not None and target.shape != source.shape:
        raise Unusable("the target is of another size", f"{_size(target)}; the image {_size(source)}")
    mask = _mask(row, source, form, find)
    pictures["mask"] = encode_png(np.rint(mask * 255).astype(np.uint8))
    example = EditExample(
        name=safe_name(identifier),
        image=source,
        mask=mask,
        instruction=instruction,
        caption=read_text(row.cells.get(form.caption), "caption") or None if form.caption else None,
        target=target,
        task=task,
    )
    try:
        check_example(example)
    except UserError as error:
        raise Unusable("it is no usable example", error.problem) from None
    for field, text in (("id", identifier), ("task", task)):
        if printable(text) != text:
            raise Unusable(f"the {field} is no text", "not whole Unicode")
    return Prepared(row.where, example, identifier, pictures, change_inside(source, target, mask))


def _as_rgb(picture: Image.Image, field: str) -> UInt8[np.ndarray, "H W 3"]:
    try:
        return as_rgb(picture, field)
    except UserError as error:
        raise Unusable(f"the {field} cannot be read", error.problem) from None


def _mask(row: Row, source: UInt8[np.ndarray, "H W 3"], form: RowForm, find: Finder) -> Float[np.ndarray, "H W"]:
    if not form.mask:
        return np.ones(source.shape[:2], np.float32)
    cell, size = row.cells.get(form.mask), source.shape[1::-1]
    try:
        if form.mask_form == RUNS and cell:
            mask = decode_runs(cell, size)
        else:
            picture = _mask_picture(row, size, form, find)
            mask = MASK_FORMS[form.mask_form](picture, source, "mask")
    except UserError as error:
        raise Unusable(f"the mask is not of the form {form.mask_form!r}", error.problem) from None
    if not mask.any():
        raise Unusable("the mask is empty")
    if mask.min() > _FULL and not form.keep_full_masks:
        raise Unusable("the mask is the whole picture")
    return mask


def _mask_picture(row: Row, size: tuple[int, int], form: RowForm, find: Finder) -> Image.Image:
    """The decoded mask at the size (width, height) of its picture."""
    content = read_content(row.cells.get(form.mask), "mask", row.folder, find)
    if content is None:
        raise Unusable("no mask")
    picture = decode(content, "mask")
    if form.resize_masks:
        picture = fit_mask(picture, size)
    if picture.size != size:
        found = f"{picture.width} x {picture.height}; the image {size[0]} x {size[1]}"
        raise Unusable("the mask is of another " + ("shape" if form.resize_masks else "size"), found)
    return picture


def _is_plain(picture: Image.Image, content: bytes) -> bool:
    """Whether a file's pixels are what every decoder makes of it, so that it can be kept as it is."""
    if picture.format not in ("PNG", "JPEG") or picture.mode != "RGB" or picture.has_transparency_data:
        return False
    with Image.open(io.BytesIO(content)) as header:  # `picture` is upright already
        is_upright = header.getexif().get(ExifTags.Base.Orientation, 1) == 1
    has_8_bits = picture.format == "JPEG" or content[_PNG_DEPTH] == 8
    return is_upright and has_8_bits and "icc_profile" not in picture.info


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def safe_name(identifier: str) -> str:
    """The id as the name of an example, which also names files: what is special in them becomes "-"."""
    stem = re.sub(r"\.(png|jpe?g|webp)$", "", printable(identifier), flags=re.IGNORECASE)
    name = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]+', "-", stem).strip(". ")
    return name[-_LONGEST_NAME:] or "-"


def change_inside(
    source: UInt8[np.ndarray, "H W 3"], target: UInt8[np.ndarray, "H W 3"] | None, mask: Float[np.ndarray, "H W"]
) -> float | None:
    """The share of the pixels that the target changes, by more than `CHANGED`, that the mask covers; None if none."""
    if target is None:
        return None
    changed = np.abs(source.astype(np.int16) - target).max(axis=-1) > CHANGED
    return float(mask[changed].mean()) if changed.any() else None
