"""Whether the region by itself shows what its caption says: a retrieval among all that a synthetic scene could show."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import ImageColor

from rcgrpo_jax.data.example import Source
from rcgrpo_jax.data.scenes.shapes import COLOURS, SHAPES, SceneObject, render
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.evaluation.measures.base import Measure
from rcgrpo_jax.rewards.colour import lab_from_srgb
from rcgrpo_jax.rewards.oracle import VISIBLE

# In squared CIELAB units: a right result scores 0.96 or more before textures. Before a photograph it scores less where
# another answer looks nearly the same, as a white star before a bright sky does where nothing was asked: 0.78 at worst
# in 150 tasks of 96 pixels, 0.95 or more in all but six.
TEMPERATURE = (VISIBLE / 2) ** 2
_SHADES = ("black", "white")
_LEVELS = np.array([ImageColor.getrgb(colour) for colour in COLOURS], np.float32) / 255


class Region(NamedTuple):
    """A window around the edit region, and what it could show; a row each, in a batch."""

    corner: Int[np.ndarray, "2"]  # the window's upper row and left column
    box: Bool[np.ndarray, "w w"]  # the bounding box of the mask, which is CompBench's crop
    nothing: UInt8[np.ndarray, "w w 3"]  # the window with no object there
    shapes: UInt8[np.ndarray, "2 8 w w 3"]  # with each of `SHAPES`, in black and in white
    asked: Int[np.ndarray, ""]  # the right answer: 0 for nothing, else 1 + 8 shape + colour


def read_region(scenes: Scenes, index: int) -> Region:
    """Draws what could be seen in a task's region: nothing, or any shape in the size and place that were asked for.

    Black and white are enough: a pixel is affine in the object's colour, and `caption_scores` mixes the others.

    Args:
        scenes: The source of tasks, of side S.
        index: The task.

    Returns:
        Windows of w = S / 2 pixels a side, in which every region fits.
    """
    scene, background = scenes.scene(index), scenes.background(index)
    size, thing = scenes.size, scene.new or scene.old
    side = size // 2
    corner = np.clip(np.rint(np.array([thing.y, thing.x]) * size).astype(int) - side // 2, 0, size - side)
    window = tuple(slice(low, low + side) for low in corner)

    def shown(new: SceneObject | None) -> UInt8[np.ndarray, "w w 3"]:
        return render(replace(scene, new=new).after, background)[window]

    mask = scene.mask(size)[window]
    asked = 0 if scene.new is None else 1 + 8 * list(SHAPES).index(thing.shape) + COLOURS.index(thing.colour)
    return Region(
        corner,
        _span(mask.any(axis=1))[:, None] & _span(mask.any(axis=0))[None, :],
        shown(None),
        np.array([[shown(replace(thing, shape=shape, colour=shade)) for shape in SHAPES] for shade in _SHADES]),
        np.array(asked),
    )


@jax.jit
def caption_scores(edited: Float[Array, "P S S 3"], regions: Region) -> Float[Array, " P"]:
    """Computes how well the edit's region tells what was asked for from all else (a measure of ours).

    It stands where the paper has LC-T, CLIP's similarity of the crop around the region and its caption. The caption of
    a scene names an object or none, and all 65 answers can be drawn: with `d_c` the mean squared CIELAB difference of
    the crop from answer c, `p_c = softmax_c(-d_c / 36)`. What all answers share, as an untouched background, cancels.

    Args:
        edited: sRGB in [0, 1].
        regions: A stack of what `read_region` gives.

    Returns:
        p of the right answer, in [0, 1], float32.
    """

    def one(task: tuple[Float[Array, "S S 3"], Region]) -> Array:
        picture, region = task
        side, (black, white) = len(region.box), region.shapes.astype(jnp.float32)
        level = _LEVELS.reshape(1, len(COLOURS), 1, 1, 3)
        objects = black[:, None] + level * (white - black)[:, None]
        answers = jnp.concatenate([region.nothing[None], objects.reshape(-1, side, side, 3)]) / 255
        crop = jax.lax.dynamic_slice(picture, (*region.corner, 0), (side, side, 3))
        error = jnp.sum((lab_from_srgb(crop)[None] - lab_from_srgb(answers)) ** 2, axis=-1)
        distance = jnp.sum(error * region.box[None], axis=(-2, -1)) / jnp.sum(region.box)
        return jax.nn.softmax(-distance / TEMPERATURE)[region.asked]

    return jax.lax.map(one, (edited, regions))


def _span(inside: Bool[np.ndarray, " w"]) -> Bool[np.ndarray, " w"]:
    """True from the first True to the last."""
    return np.logical_or.accumulate(inside) & np.logical_or.accumulate(inside[::-1])[::-1]


def _is_drawn(source: Source, size: tuple[int, int]) -> bool:
    """Whether all that a region could show can be drawn: of scenes in their own size."""
    return isinstance(source, Scenes) and tuple(size) == (source.size, source.size)


CAPTION = Measure(
    "caption", "caption", 3, "↑", lambda inputs, regions: caption_scores(inputs.edited, regions),
    fits=_is_drawn, read=read_region,
    wanted="it compares with all that a region could show, which is known of synthetic scenes in their own size",
)  # fmt: skip
