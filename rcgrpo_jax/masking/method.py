"""What a way of finding masks is, and what all of them have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

from rcgrpo_jax.data.example import EditExample

HALF = 0.5  # of a score: where a method puts the border of the edit
LEVELS = 255  # of a mask in a file

Scores = Float[np.ndarray, "H W"]  # float32 in [0, 1], above HALF where the edit belongs


class Method(NamedTuple):
    """A way of finding masks, opened."""

    scores: Callable[[EditExample], Scores]  # raises a UserError where an example has not what it needs
    settings: Mapping[str, Any]  # what its scores depend on besides the example, as JSON


@dataclass(frozen=True)
class MethodOptions:
    """What methods are opened with; each reads its own."""

    segmenter: str = ""  # segment: ONNX file
    normalisation: str = "imagenet"  # segment: a name of `segmenter.NORMALISATIONS`
    model: str = ""  # editor: diffusers folder or converted directory
    size: tuple[int, int] | None = None  # editor: (height, width) of its pictures; None: the nearest of Kontext's
    seed: int = 0  # editor: of the noise
    guidance: float = 2.5  # editor: guidance scale
    dtype: str = "bfloat16"  # editor: of computation
    quantization: str = "none"  # editor: of the transformer's kernels
    max_text_tokens: int = 0  # editor: length of the T5 sequence; 0: the model's


class Finish(NamedTuple):
    """How scores become a mask."""

    threshold: float | None = HALF  # scores from which a pixel is in the mask; None: the scores are the mask
    dilate: int = 0  # pixels by which the mask grows, as a square


def resize_scores(scores: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Scores:
    """Brings a coarse map to `size = (height, width)`, bilinearly."""
    height, width = size
    resized = Image.fromarray(np.asarray(scores, np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized).clip(0, 1)


def finish_mask(scores: Scores, finish: Finish) -> Scores:
    """The mask of an example, in the 255 levels of a file.

    Args:
        scores: Of a method.
        finish: The threshold and the dilation.

    Returns:
        `[H, W]` float32 in [0, 1]; 0 and 1 alone where there is a threshold.
    """
    mask = scores if finish.threshold is None else scores >= finish.threshold
    mask = np.rint(mask.astype(np.float32).clip(0, 1) * LEVELS) / np.float32(LEVELS)
    return ndimage.maximum_filter(mask, size=2 * finish.dilate + 1) if finish.dilate else mask


def flaw(mask: Scores) -> str | None:
    """Why a mask tells no region; None for one that does."""
    inside = mask >= HALF
    if not inside.any():
        return "the mask came out empty: nothing was found to differ or to stand out"
    if inside.all():
        return "the mask came out full: the whole picture was found"
    return None
