"""Flat coloured shapes as signed distances: what covers a pixel, and by how much, follows from one formula each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import ImageColor

Plane = Float[np.ndarray, "h w"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")  # CSS names
SIZES = {"small": 0.085, "medium-sized": 0.12, "large": 0.165}  # radius, in sides of the picture
LIGHT, SHADE, OUTLINE = 0.14, 0.14, 0.4  # towards white at the upper left, black at the lower right, black at the edge
_EXTENT = 1.15  # no shape reaches further along an axis, in radii


def _circle(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 0.9


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - 0.78


def _triangle(x: Plane, y: Plane) -> Plane:
    return np.maximum(y - 0.68, (1.58 * np.abs(x) - 0.9 * (y + 0.9)) / np.hypot(1.58, 0.9))


def _diamond(x: Plane, y: Plane) -> Plane:
    return (np.abs(x) + 0.7 * np.abs(y) - 0.7) / np.hypot(1, 0.7)


def _star(x: Plane, y: Plane) -> Plane:
    sector = 2 * np.pi / 5
    angle = np.arctan2(x, -y)  # from straight up, where a tip is
    angle = np.abs(np.mod(angle + sector / 2, sector) - sector / 2)
    radius, inner = np.hypot(x, y), 0.46
    along, across = inner * np.cos(sector / 2) - 1, inner * np.sin(sector / 2)  # from the tip to the inner corner
    return ((radius * np.cos(angle) - 1) * across - radius * np.sin(angle) * along) / np.hypot(along, across)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - 0.7) - 0.22


def _cross(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.32, y - 0.9), np.maximum(x - 0.9, y - 0.32))


def _heart(x: Plane, y: Plane) -> Plane:
    side = 0.54  # half of a square on its corner; two discs sit on its upper edges
    x, y = np.abs(x), y - 0.1
    square = (x + np.abs(y)) / np.sqrt(2) - side
    return np.minimum(square, np.hypot(x - side / np.sqrt(2), y + side / np.sqrt(2)) - side)


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
}


@dataclass(frozen=True)
class SceneObject:
    """A shape in a picture; places are in sides of the picture, from its upper left corner."""

    shape: str  # of SHAPES
    colour: str  # of COLOURS
    size: str  # of SIZES
    x: float  # centre, to the right
    y: float  # centre, downwards

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def rgb(self) -> Float[np.ndarray, "3"]:
        return np.array(ImageColor.getrgb(self.colour), np.float64)


def signed_distance(thing: SceneObject, size: int, window: tuple[slice, slice] = np.s_[:, :]) -> Plane:
    """Computes the distance of pixel centres from an object's edge, negative inside.

    Exact along straight edges and circles; beyond a corner it is that of the nearest edge's line, so less.

    Args:
        thing: The object.
        size: Side of the picture, pixels.
        window: The rows and columns wanted.

    Returns:
        Pixels, `[h, w]` float64.
    """
    x, y, radius = _local(thing, size, window)
    return SHAPES[thing.shape](x, y) * radius


def coverage(thing: SceneObject, size: int, window: tuple[slice, slice] = np.s_[:, :]) -> Plane:
    """Computes the share of each pixel that an object covers, `clip(1/2 - distance, 0, 1)`, `[h, w]` float64."""
    return np.clip(0.5 - signed_distance(thing, size, window), 0, 1)


def render(
    objects: Sequence[SceneObject], background: Float[np.ndarray, "S S 3"]
) -> UInt8[np.ndarray, "S S 3"]:  # fmt: skip
    """Draws objects over a background, the first at the bottom.

    Colours are blended by coverage, in sRGB. Pixels with no coverage by an object do not depend on it, to the bit.

    Args:
        objects: From bottom to top.
        background: sRGB in [0, 255], float64.

    Returns:
        sRGB, 8 bits.
    """
    canvas, size = background.copy(), len(background)
    for thing in objects:
        window = _window(thing, size)
        x, y, radius = _local(thing, size, window)
        distance = SHAPES[thing.shape](x, y) * radius
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        canvas[window] = canvas[window] * (1 - cover) + _paint(thing.rgb, x, y, distance, size) * cover
    return np.rint(canvas).astype(np.uint8)


def footprint(
    thing: SceneObject, above: Sequence[SceneObject], size: int, margin: float = 0.0
) -> Bool[np.ndarray, "S S"]:
    """Finds the pixels that an object has a part in: where its coverage is not 0 and no object above hides it wholly.

    Args:
        thing: The object.
        above: The objects drawn after it.
        size: Side of the picture, pixels.
        margin: Pixels that the outline is moved outwards.

    Returns:
        True in the footprint; outside it, the rendered picture does not depend on the object.
    """
    inside = np.zeros((size, size), bool)
    window = _window(thing, size, margin)
    inside[window] = signed_distance(thing, size, window) < 0.5 + margin
    for other in above:
        window = _window(other, size)
        inside[window] &= coverage(other, size, window) < 1
    return inside


def _local(thing: SceneObject, size: int, window: tuple[slice, slice]) -> tuple[Plane, Plane, float]:
    """The x and y of pixel centres from an object's centre, in radii, and the radius in pixels."""
    centres, radius = (np.arange(size) + 0.5) / size, thing.radius
    x, y = (centres[window[1]] - thing.x) / radius, (centres[window[0]] - thing.y) / radius
    x, y = np.broadcast_arrays(x[None, :], y[:, None])
    return x, y, radius * size


def _window(thing: SceneObject, size: int, margin: float = 0.0) -> tuple[slice, slice]:
    """The rows and columns that an object, moved outwards by a margin in pixels, can cover a part of."""
    reach = thing.radius * size * _EXTENT + 3 * margin + 1  # moved outwards, a tip of the star gains 2.6 margins
    low_x, low_y = (max(int(centre * size - reach), 0) for centre in (thing.x, thing.y))
    high_x, high_y = (int(np.ceil(centre * size + reach)) for centre in (thing.x, thing.y))
    return slice(low_y, high_y), slice(low_x, high_x)


def _paint(rgb: Float[np.ndarray, "3"], x: Plane, y: Plane, distance: Plane, size: int) -> Float[np.ndarray, "h w 3"]:
    """An object's colours: lit from the upper left, with a dark outline a hundredth of the side wide."""
    light = np.clip(-(x + y) / 2, -1, 1)[..., None]
    lit = rgb + np.where(light > 0, LIGHT * light * (255 - rgb), SHADE * light * rgb)
    outline = np.clip(0.5 + distance + size / 100, 0, 1)[..., None]
    return lit * (1 - OUTLINE * outline)
