"""Colour profiles: samples of Display P3, Adobe RGB, grey and CMYK spaces become sRGB's, which the models know."""

from __future__ import annotations

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms

from rcgrpo_jax.errors import reason

logger = logging.getLogger(__name__)

_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> Pillow's mode
_SAME = 2  # levels of 255: profiles of sRGB itself differ so much by the rounding of their tables


def to_srgb(image: Image.Image, where: str) -> Image.Image:
    """Converts a picture to RGB with sRGB's primaries and curve, by its ICC profile where it has another one.

    The intent is relative colorimetric with black point compensation: colours that sRGB has are kept exactly, white
    stays white and black black, and what lies outside is clipped. A perceptual conversion would move all colours, and
    is not defined for the matrix profiles of cameras and displays. Pictures without a profile are taken as sRGB; those
    with a profile of sRGB come back bit for bit.

    A profile that is damaged or of another kind of picture is left out, with a warning. Another warning tells of
    cameras' pictures in Adobe RGB that only their EXIF data call so.

    Args:
        image: Of 8 bits a sample, with the profile in its `info`; transparency is dropped.
        where: Names the picture in the warning.

    Returns:
        An image of mode RGB.
    """
    rgb = without_alpha(image)
    profile = image.info.get("icc_profile")
    if not profile:
        if _says_adobe_rgb(image):
            logger.warning("%s: the camera says Adobe RGB, without a profile; samples are taken as sRGB", where)
        return rgb
    try:
        mode, transform = _transform(profile)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.warning("%s: the colour profile cannot be used (%s); samples are taken as sRGB", where, reason(error))
        return rgb
    if transform is None:
        return rgb
    if mode == "RGB" and image.mode != "CMYK":
        samples = rgb
    elif mode == "L" and image.mode in ("1", "L", "LA"):
        samples = image.convert("L") if image.mode != "LA" else image.getchannel("L")
    elif mode == image.mode:
        samples = image
    else:
        logger.warning(
            "%s: the colour profile is of %s samples, and the picture's are %s; they are taken as sRGB",
            where, mode, image.mode,
        )  # fmt: skip
        return rgb
    return ImageCms.applyTransform(samples, transform)


def without_alpha(image: Image.Image) -> Image.Image:
    """The RGB of an image, its transparency dropped; Pillow wants that of a palette kept until there are colours."""
    return image.convert("RGBA").convert("RGB") if image.has_transparency_data else image.convert("RGB")


def _says_adobe_rgb(image: Image.Image) -> bool:
    """Whether EXIF names the colour space of DCF's optional files, which is Adobe RGB: interoperability index R03."""
    try:
        return image.getexif().get_ifd(ExifTags.IFD.Interop).get(1) == "R03"
    except Exception:  # Pillow raises many types on damaged EXIF
        return False


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of a profile's samples and their transform to sRGB, None where that changes nothing."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space
    if space not in _MODES:
        raise ValueError(f"its colour space is {space.strip()!r}; RGB, GRAY or CMYK was wanted")
    mode = _MODES[space]
    transform = ImageCms.buildTransform(
        source, ImageCms.createProfile("sRGB"), mode, "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )  # fmt: skip
    if mode == "CMYK":
        return mode, transform
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1) if mode == "RGB" else levels[None]
    probe = Image.fromarray(probe.reshape(1, -1, 3) if mode == "RGB" else probe)
    apart = np.asarray(ImageCms.applyTransform(probe, transform), int) - np.asarray(probe.convert("RGB"), int)
    return mode, None if np.abs(apart).max() <= _SAME else transform
