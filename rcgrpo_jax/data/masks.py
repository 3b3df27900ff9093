"""Edit regions out of mask files: black and white with greys between, or the values that a user names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageFilter

from rcgrpo_jax.data.images import open_image, to_8_bits
from rcgrpo_jax.data.profiles import without_alpha
from rcgrpo_jax.errors import UsageError, UserError

Polarity = Literal["white", "black"]
MaskValue = int | tuple[int, int, int]  # a number as it is stored, or a colour
Marking = tuple[Polarity, str]  # how a mask tells its region: by polarity, or by the mask value where there is one

_LARGEST = 2**16 - 1  # number that a file can store
_WHITE = 0.94  # of the range: what lossy files and cameras leave of white
_FAINT = 0.45  # of the range: below it no region is meant as a whole; from it on a flat grey is a strength
_FEW, _EXACT = 64, 16  # distinct levels: more are a label map's seldom; at most these hold no noise
_REACH = 5  # pixels: a grey of a soft edge has a darker and a brighter one that near
_STRAY = 0.02  # of the pixels that are not background: single dots of grey do not make a label map
_CHROMA = 32  # of 255: largest minus least of a pixel's RGB, above what lossy files make of grey
_LISTED = 6  # values in a message


def read_mask(path: str | Path, polarity: Polarity = "white", mask_value: str = "") -> Float[np.ndarray, "H W"]:
    """Reads an edit region from a file.

    Without a `mask_value` it is the picture's luminance (ITU-R 601: 0.299 R + 0.587 G + 0.114 B). Greys make a soft
    mask and are not binarised. Label maps, of class numbers or class colours, are told from soft masks by their
    colours, or by faint greys that fill areas, and refused: as luminances they would be regions of hardly any weight.
    With a `mask_value` the region is where the file stores one of these values.

    The file is treated as by `read_image`, but for two things: colour profiles are no matter, and transparency is
    refused, since tools disagree on whether the transparent part of a mask is the region or its outside.

    Args:
        path: A file in any format that Pillow reads, opaque.
        polarity: The colour of the edit region, `"white"` or `"black"`, where `mask_value` is empty.
        mask_value: As for `parse_mask_value`.

    Returns:
        `[H, W]` float32 in [0, 1], 1 inside the edit region.

    Raises:
        UserError: As `read_image`; the mask has transparent pixels, is a label map, or has none of the values.
        UsageError: The polarity is neither of the two, or `mask_value` is malformed.
    """
    check_marking(polarity, mask_value)
    return edit_region(open_image(path), str(path), polarity, mask_value)


def check_marking(polarity: str, mask_value: str, fields: tuple[str, str] = ("mask polarity", "mask_value")) -> None:
    """Raises a UsageError that names the field unless polarity and mask value say together which region is meant."""
    if polarity not in get_args(Polarity):
        raise UsageError(
            f"{fields[0]}: {polarity[:80]!r} found; 'white' or 'black' was wanted.",
            "Name the colour that marks the edit region in the mask.",
        )
    if parse_mask_value(mask_value, fields[1]) and polarity != "white":
        raise UsageError(
            f"{fields[0]}: {polarity} found beside {fields[1]} = {mask_value}; one of them was wanted.",
            f"Leave {fields[0]} out: {fields[1]} alone says what the edit region is.",
        )


def parse_mask_value(text: str, field: str = "mask_value") -> tuple[MaskValue, ...]:
    """Reads which values of a mask are the edit region: `"15"`, `"2,5"`, `"#800000"`, or `""` for none.

    Args:
        text: Values separated by commas: whole numbers as the file stores them (grey level, class number or index of
            the palette), or colours as `#RRGGBB`.
        field: Its name in the message.

    Raises:
        UsageError: The text is no such list.
    """
    values: list[MaskValue] = []
    for part in text.split(",") if text.strip() else ():
        part = part.strip()
        if re.fullmatch("#[0-9a-fA-F]{6}", part):
            values.append(tuple(bytes.fromhex(part[1:])))
        elif re.fullmatch("[0-9]{1,5}", part) and int(part) <= _LARGEST:
            values.append(int(part))
        else:
            raise UsageError(
                f"{field}: {text[:80]!r} found; numbers from 0 to {_LARGEST} or colours such as #800000, with commas "
                "between them, were wanted.",
                "Write what the mask's file holds where the edit belongs, such as 15, or 2,5, or #800000.",
            )
    return tuple(values)


def edit_region(image: Image.Image, where: str, polarity: Polarity, mask_value: str) -> Float[np.ndarray, "H W"]:
    """The edit region of a decoded mask; arguments but the first two, result and errors as of `read_mask`.

    Args:
        image: As `open_image` returns it.
        where: Names the mask in messages.
    """
    values = parse_mask_value(mask_value)
    if not values or "A" in image.getbands():
        _check_opaque(image, where)
    if values:
        return _where_stored(image, where, values, mask_value)
    if image.mode.startswith("I"):
        grey, top, coloured = to_8_bits(image, where).convert("L"), _LARGEST, False
        stored = np.asarray(image).astype(np.int64)
    else:
        colours = without_alpha(image)
        grey, top, coloured = colours.convert("L"), 255, _chroma(np.asarray(colours)).max() > _CHROMA
        stored = np.asarray(grey)
    region = stored if polarity == "white" else top - stored
    if coloured or _is_label_map(region, top) or (np.ptp(stored) and _is_label_map(top - region, top)):
        found = _values_of(image, where)
        raise UserError(
            f"{where}: the mask has {'colours' if coloured else 'the levels of a label map'}, {_listed(found)}; black "
            "and white were wanted, or a mask_value that says which of them are the edit region.",
            f"Set it: --mask_value={_suggested(found)}, say, or --config.data.mask_value for a run, or mask_value in a "
            "line of metadata.jsonl; or save the mask in black and white.",
        )
    white = np.asarray(grey, np.float32) / np.float32(255)
    return white if polarity == "white" else 1 - white


def _chroma(colours: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    """How far the samples of each pixel are apart; by planes, which takes a thirtieth of the time of `np.ptp`."""
    red, green, blue = np.moveaxis(colours, -1, 0)
    return np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)


def _check_opaque(image: Image.Image, where: str) -> None:
    if not image.has_transparency_data:
        return
    image = to_8_bits(image, where) if image.mode.startswith("I") else image
    if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise UserError(
            f"{where}: the mask has transparent pixels; an opaque black and white image was wanted.",
            "Flatten the mask, with the edit region in one of black and white and everything else in the other.",
        )


def _is_label_map(levels: Integer[np.ndarray, "H W"], top: int) -> bool:
    """Whether greys, the edit region bright, are the numbers of classes rather than a soft mask.

    The faint greys of a soft mask are steps between dark and bright: nearly all lie within a few pixels of both. A
    class fills an area with one level, or its map is faint throughout and yet has sharp edges.

    Args:
        levels: In `0 .. top`.
        top: What is white.
    """
    values = np.flatnonzero(np.bincount(levels.ravel()))
    faint, white = _FAINT * top, _WHITE * top
    if len(values) == 1:
        return bool(0 < values[0] < faint)
    if values[0] >= white:  # nothing is outside: numbers near 0, read with black as the region
        return len(values) <= _EXACT
    if values[-1] < faint and _is_sharp(levels):
        return True
    noise = top - white if len(values) > _EXACT and values[-1] >= white else 0
    between = (levels > values[0] + noise) & (levels < faint)
    if len(values) > _FEW or not between.any():
        return False
    rank = np.searchsorted(values, levels).astype(np.uint8)
    picture, window = Image.fromarray(rank), 2 * _REACH + 1
    darker = np.asarray(picture.filter(ImageFilter.MinFilter(window))) < rank
    brighter = np.asarray(picture.filter(ImageFilter.MaxFilter(window))) > rank
    alone = (between & ~(darker & brighter)).sum()
    return bool(alone > max(between.sum() / 2, _STRAY * (levels > values[0] + noise).sum()))


def _is_sharp(levels: Integer[np.ndarray, "H W"]) -> bool:
    """Whether neighbours differ somewhere by a quarter of all that there is."""
    steps = (np.abs(np.diff(levels.astype(np.int32), axis=axis)).max(initial=0) for axis in (0, 1))
    return 4 * max(steps) > np.ptp(levels)


def _where_stored(
    image: Image.Image, where: str, values: tuple[MaskValue, ...], mask_value: str
) -> Float[np.ndarray, "H W"]:
    """1 where the file stores one of the values, else 0."""
    if image.format in ("JPEG", "MPO"):
        raise UserError(
            f"{where}: a JPEG, which does not keep the values of a mask; a PNG was wanted with mask_value.",
            "Save the mask as PNG from its source, or leave mask_value out if it is black and white.",
        )
    numbers, colours = _stored(image, where)
    inside = np.zeros(numbers.shape, bool)
    for value in values:
        inside |= numbers == value if isinstance(value, int) else (colours == value).all(axis=-1)
    if not inside.any():
        found = _values_of(image, where)
        raise UserError(
            f"{where}: no pixel of the mask has mask_value = {mask_value}; found {_listed(found)}.",
            "Correct mask_value, or leave the example out.",
        )
    return inside.astype(np.float32)


def _stored(image: Image.Image, where: str) -> tuple[Integer[np.ndarray, "H W"], UInt8[np.ndarray, "H W 3"]]:
    """What a file stores: a number for each pixel, -1 where it has a colour alone, and the colours."""
    if image.mode.startswith("I"):
        return np.asarray(image), np.asarray(to_8_bits(image, where).convert("RGB"))
    colours = np.asarray(without_alpha(image))
    if image.mode == "P":
        return np.asarray(image), colours
    grey: Bool[np.ndarray, "H W"] = _chroma(colours) == 0
    return np.where(grey, colours[..., 0].astype(np.int32), -1), colours


def _values_of(image: Image.Image, where: str) -> list[tuple[str, str, float]]:
    """The values of a mask, as `mask_value` names them and as a message shows them, with their share of the pixels.

    The most frequent come first.
    """
    numbers, colours = _stored(image, where)
    flat = colours.reshape(-1, 3)
    keys = numbers.ravel().astype(np.int64)
    keys = np.where(keys < 0, -1 - (flat @ (1 << 16, 1 << 8, 1)), keys)  # colours below, numbers from 0
    unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
    found = []
    for i in np.argsort(-counts, kind="stable"):
        colour = "#" + bytes(flat[first[i]]).hex()
        name = colour if unique[i] < 0 else str(unique[i])
        shown = f"{name} ({colour})" if image.mode == "P" else name
        found.append((name, shown, counts[i] / len(keys)))
    return found


def _listed(found: list[tuple[str, str, float]]) -> str:
    """Values in words: `0: 86 %, 15: 14 %`."""
    named = ", ".join(f"{shown}: {100 * share:.3g} %" for _, shown, share in found[:_LISTED])
    return named + (f" and {len(found) - _LISTED} more" if len(found) > _LISTED else "")


def _suggested(found: list[tuple[str, str, float]]) -> str:
    """The value for an example of `mask_value`: the most frequent that is not the background's."""
    return next((name for name, _, _ in found[1:] if name not in ("0", "#000000")), found[0][0])
