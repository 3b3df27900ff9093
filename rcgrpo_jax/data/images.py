"""Pixels in and out of files, and the sizes an editor works at; numpy and Pillow only."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from rcgrpo_jax import filetypes
from rcgrpo_jax.data.paths import Finder
from rcgrpo_jax.data.profiles import to_srgb
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.whole import whole_file

# The 17 (width, height) pairs that FLUX.1-Kontext was trained at: `PREFERRED_KONTEXT_RESOLUTIONS` of diffusers.
_PORTRAIT = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
KONTEXT_SIZES = (*_PORTRAIT, (1024, 1024), *((height, width) for width, height in reversed(_PORTRAIT)))

DISPLAY_SIDES = (160, 320)  # least and most pixels of the longer side of a picture for people
_OUTLINE, _RED = 2, (230, 30, 30)  # of a region: pixels, colour
Colour = tuple[int, int, int]


def read_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Reads a picture as 8-bit RGB, upright.

    The EXIF rotation is applied; samples of another colour profile become sRGB's (`profiles.to_srgb`); transparency is
    flattened over white; 16-bit samples are scaled by 255 / 65535 and rounded (16-bit colour PNGs keep their high byte,
    as Pillow decodes them); palette, grey and CMYK become RGB; an animation gives its first frame.

    Args:
        path: A file in any format that Pillow reads.

    Returns:
        `[H, W, 3]` uint8.

    Raises:
        UserError: The file is missing, not an image, damaged, unreasonably large, or of a sample type not listed above.
    """
    found = path if os.path.exists(path) else Finder()(Path(path))
    return as_rgb(open_image(found), str(path))


def as_rgb(image: Image.Image, where: str) -> UInt8[np.ndarray, "H W 3"]:
    """The 8-bit RGB of an image that `open_image` returned; arguments, result and errors as there."""
    if image.mode.startswith("I"):
        image = to_8_bits(image, where)
    colours = to_srgb(image, where)
    if image.has_transparency_data:
        colours.putalpha(image.convert("RGBA").getchannel("A"))
        colours = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return np.array(colours)


def open_image(source: str | Path | io.BytesIO, where: str = "") -> Image.Image:
    """Decodes an image, upright, of 8 bits a sample or 16 bits of grey, in whatever colour mode it came.

    Args:
        source: A file, or its content.
        where: Names it in messages; the path by default.

    Raises:
        UserError: As `read_image`.
    """
    where = where or str(source)
    try:
        with Image.open(source) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            image.format = file.format
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file; an image was wanted.", "Correct the path.") from None
    except Image.UnidentifiedImageError:
        raise _no_image(source, where) from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{where}: the header claims more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; a smaller image was wanted.",
            "Scale the image down before use; editors work at about one million pixels.",
        ) from None
    except Exception as error:  # Pillow's decoders raise many types on damaged bytes, and no list of them is complete
        raise UserError(
            f"{where}: the file cannot be read to its end ({error}); a whole image was wanted.",
            "Check the permissions, and copy or download the file again.",
        ) from error
    if image.mode in ("F", "LAB"):
        raise UserError(
            f"{where}: samples of Pillow mode {image.mode!r}; 8 or 16 bits of grey, RGB or CMYK were wanted.",
            "Save the image as an 8-bit PNG.",
        )
    return image


def _no_image(source: str | Path | io.BytesIO, where: str) -> UserError:
    """The error for a file of which Pillow knows no decoder."""
    kind = None if isinstance(source, io.BytesIO) else filetypes.describe(source)
    if kind == filetypes.LFS_POINTER:
        return UserError(f"{where}: this is {kind}; an image was wanted.", filetypes.LFS_REMEDY)
    found = f"this is {kind}" if kind else "the file is not an image that Pillow can read"
    return UserError(
        f"{where}: {found}; a whole PNG, JPEG, WebP or TIFF was wanted.", "Save it as a PNG, or correct the path."
    )


def to_8_bits(image: Image.Image, where: str) -> Image.Image:
    """Scales the integer modes, in which Pillow keeps 16-bit grey, to 8 bits with rounding; `where` as `open_image`."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise UserError(
            f"{where}: grey values from {grey.min()} to {grey.max()}; 16 bits (0 to 65535) were wanted.",
            "Save the image as an 8-bit PNG.",
        )
    scaled = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    scaled.info |= {key: image.info[key] for key in ("icc_profile",) if key in image.info}
    if (key := image.info.get("transparency")) is not None:
        scaled.putalpha(Image.fromarray(np.where(grey == key, 0, 255).astype(np.uint8)))
    return scaled


def save_image(path: str | Path, image: UInt8[np.ndarray, "H W *_"]) -> None:
    """Writes 8-bit RGB or grey as a PNG, which is lossless, whole or not at all; the folder is made if need be.

    Raises:
        UserError: The name ends otherwise than in `.png`, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: the suffix is {path.suffix!r}; '.png' was wanted.", "Name the output NAME.png.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            Image.fromarray(image).save(partial, "PNG")
    except OSError as error:
        raise UserError(
            f"{path}: the image cannot be written ({error}).", "Choose a folder you can write to."
        ) from error


def resize_image(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Resamples a picture to `size = (height, width)` with Pillow's Lanczos filter, without cropping."""
    height, width = size
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def resize_mask(mask: Float[np.ndarray, "H W"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Resamples a mask to `size = (height, width)`, so that no new values appear and no part of a region is lost.

    Where it shrinks, a pixel takes the largest of those it stands for; else the nearest.
    """
    for axis, count in enumerate(size):
        given = mask.shape[axis]
        if count < given:
            mask = np.maximum.reduceat(mask, np.arange(count) * given // count, axis=axis)
        else:
            mask = mask.take((np.arange(count) * 2 + 1) * given // (2 * count), axis=axis)
    return mask.astype(np.float32)


def for_display(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Brings a picture's longer side into `DISPLAY_SIDES`: small ones by a whole factor (nearest), large by Lanczos."""
    smallest, largest = DISPLAY_SIDES
    longest = max(image.shape[:2])
    if longest < smallest:
        factor = -(-smallest // longest)
        return image.repeat(factor, axis=0).repeat(factor, axis=1)
    if longest > largest:
        return resize_image(image, tuple(max(1, side * largest // longest) for side in image.shape[:2]))
    return image


def outline(
    image: UInt8[np.ndarray, "H W 3"], mask: Float[np.ndarray, "h w"], colour: Colour = _RED
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the inner rim of a mask's region, all that is above 0, onto a picture of any size: two pixels wide."""
    inside = np.asarray(Image.fromarray(np.asarray(mask) > 0).resize(image.shape[1::-1], Image.Resampling.NEAREST))
    window = 2 * _OUTLINE + 1
    # Padding counts as outside: a region that reaches the border, or fills the image, is outlined there too.
    around = np.lib.stride_tricks.sliding_window_view(np.pad(inside, _OUTLINE), (window, window))
    pixels = image.copy()
    pixels[inside & ~around.all(axis=(-2, -1))] = colour
    return pixels


def kontext_size(height: int, width: int, preferred: Sequence[tuple[int, int]] = KONTEXT_SIZES) -> tuple[int, int]:
    """Finds the resolution of FLUX.1-Kontext whose aspect ratio, width / height, is nearest to a picture's.

    Args:
        height: Of the picture, pixels.
        width: Of the picture, pixels.
        preferred: The `(width, height)` pairs to choose from.

    Returns:
        `(height, width)` of the chosen resolution.
    """
    best = min(preferred, key=lambda pair: abs(width / height - pair[0] / pair[1]))
    return best[1], best[0]
