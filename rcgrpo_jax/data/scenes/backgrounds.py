"""Backgrounds of scenes: muted textures drawn from a generator, and crops of real photographs."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from PIL import Image

from rcgrpo_jax.data.images import read_image
from rcgrpo_jax.data.scenes.photographs import find_photographs

Field = Float[np.ndarray, "S S"]

_GRAIN = 0.05  # peak to peak, of 1: so that no background is flat
_PHOTO_RANGE = (40, 215)  # of 255; black and white stay free for objects


def value_noise(rng: np.random.Generator, cells: int, size: int) -> Field:
    """Draws smooth noise in [0, 1]: uniform values on a grid, blended by `3 f^2 - 2 f^3` between its points."""
    grid = rng.random((cells + 1, cells + 1))
    place = (np.arange(size) + 0.5) / size * cells
    left = place.astype(int)
    f = place - left
    f = f * f * (3 - 2 * f)
    rows = grid[left] * (1 - f)[:, None] + grid[left + 1] * f[:, None]
    return rows[:, left] * (1 - f) + rows[:, left + 1] * f


def _gradient(rng: np.random.Generator, size: int) -> Field:
    along, across = _axes(rng, size)
    bend = rng.uniform(-0.8, 0.8)
    return np.clip(0.5 + 0.6 * along + bend * across**2, 0, 1)


def _clouds(rng: np.random.Generator, size: int) -> Field:
    octaves = [value_noise(rng, cells, size) / cells for cells in (3, 6, 12, 24)]
    field = sum(octaves) * 3 / (1 + 1 / 2 + 1 / 4 + 1 / 8)
    return np.clip(0.5 + 1.5 * (field - 0.5), 0, 1)


def _stripes(rng: np.random.Generator, size: int) -> Field:
    along, _ = _axes(rng, size)
    wave = rng.uniform(3, 7) * along + rng.uniform(0.1, 0.4) * value_noise(rng, 3, size)
    return np.clip(0.5 + np.sin(2 * np.pi * wave), 0, 1)


def _checks(rng: np.random.Generator, size: int) -> Field:
    along, across = _axes(rng, size)
    count = rng.uniform(2, 4)
    return np.clip(0.5 + 2.5 * np.sin(2 * np.pi * count * along) * np.sin(2 * np.pi * count * across), 0, 1)


def _blotches(rng: np.random.Generator, size: int) -> Field:
    field = 0.7 * value_noise(rng, 7, size) + 0.3 * value_noise(rng, 15, size)
    return np.clip(0.5 + 5 * (field - 0.5), 0, 1)


TEXTURES: dict[str, Callable[[np.random.Generator, int], Field]] = {
    "gradient": _gradient,
    "clouds": _clouds,
    "stripes": _stripes,
    "checks": _checks,
    "blotches": _blotches,
}


def texture(kind: str, rng: np.random.Generator, size: int) -> Float[np.ndarray, "S S 3"]:
    """Draws a background of a kind in two muted colours, with a fine grain.

    What is drawn from the generator does not depend on the size: another size shows the same texture.

    Args:
        kind: Of `TEXTURES`.
        rng: Draws the colours and the texture.
        size: Side, pixels.

    Returns:
        sRGB in [0, 255], float64; values within about [55, 210].
    """
    hue, value = rng.random(), rng.uniform(0.38, 0.76)
    step = rng.uniform(0.1, 0.2) * (1 if value < 0.57 else -1)
    first, second = (
        np.array(colorsys.hsv_to_rgb(h % 1, rng.uniform(0.1, 0.32), v))
        for h, v in ((hue, value), (hue + rng.uniform(-0.2, 0.2), value + step))
    )
    field = TEXTURES[kind](rng, size)[..., None]
    grain = _GRAIN * (value_noise(rng, 48, size)[..., None] - 0.5)
    return 255 * (first * (1 - field) + second * field + grain)


def photograph(name: str, rng: np.random.Generator, size: int) -> Float[np.ndarray, "S S 3"]:
    """Cuts a random square from a photograph, half its shorter side or more, in a narrowed tonal range.

    Args:
        name: Of `find_photographs`.
        rng: Draws the square, as shares of the photograph.
        size: Side of the result, pixels.

    Returns:
        sRGB in [40, 215], float64.

    Raises:
        UserError: What carries the photographs is not installed (`find_photographs`).
    """
    picture = _read(name)
    side = rng.uniform(0.5, 1) * min(picture.size)
    left, top = (rng.random() * (length - side) for length in picture.size)
    box = (left, top, left + side, top + side)
    crop = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box=box), np.float64)
    low, high = _PHOTO_RANGE
    return low + crop * ((high - low) / 255)


@functools.cache
def _read(name: str) -> Image.Image:
    return Image.fromarray(read_image(find_photographs()[name]))


def _axes(rng: np.random.Generator, size: int) -> tuple[Field, Field]:
    """Two perpendicular coordinates of a random direction, in sides from the centre."""
    angle, centred = rng.uniform(0, 2 * np.pi), (np.arange(size) + 0.5) / size - 0.5
    x, y = centred[None, :], centred[:, None]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
