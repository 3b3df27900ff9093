"""What CLIP says of the edited region: LC-I is its likeness to the right result, LC-T to the caption (CompBench)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image

from rcgrpo_jax.evaluation.examples import EditedBatch
from rcgrpo_jax.evaluation.measures.base import MeasureInputs, MeasureOptions
from rcgrpo_jax.models.clip_vision import CLIP, normalised
from rcgrpo_jax.rewards.clip import embed_regions, embed_texts
from rcgrpo_jax.weights.clip import CLIPFolder, load_clip

MARGIN = 0.25  # around a region, on either side, in longer sides of its bounding box: that of the rewards
BLANK = " "  # what CompBench's script compares with where there is no caption
REMEDY = (
    "Give --clip FOLDER, that of a CLIP model in transformers' layout, or its name on the hub; CompBench's is "
    "openai/clip-vit-large-patch14."
)


class Vectors(NamedTuple):
    """CLIP's unit vectors of a batch; a row is NaN where an example has no such thing."""

    edited: Float[Array, "P D"]  # the edit's region
    target: Float[Array, "P D"]  # that of the right result
    caption: Float[Array, "P D"]
    empty: Bool[np.ndarray, " P"]  # whether there is no region to look at


def load_model(options: MeasureOptions) -> CLIPFolder | None:
    """The CLIP model, or None where none is named."""
    return load_clip(options.clip) if options.clip else None


def lc_i(inputs: MeasureInputs, vectors: Vectors) -> Float[Array, " P"]:
    """Computes the cosine of CLIP's vectors of the edit's region and the target's: in [-1, 1], 0 without a region."""
    return jnp.where(vectors.empty, 0, jnp.einsum("pd,pd->p", vectors.edited, vectors.target))


def lc_t(inputs: MeasureInputs, vectors: Vectors) -> Float[Array, " P"]:
    """Computes CLIPScore (Hessel et al. 2021) of the edit's region and its caption, in percent.

    `100 max(cos, 0)`, as torchmetrics has it; 0 without a region.
    """
    return jnp.where(vectors.empty, 0, 100 * jnp.maximum(jnp.einsum("pd,pd->p", vectors.edited, vectors.caption), 0))


def official_vectors(folder: CLIPFolder, edited: EditedBatch) -> Vectors:
    """What CompBench's script shows CLIP: the bounding box of what is above 0 in the mask, without its last row and
    column, through CLIP's processor on 8 bits, which cuts a box to its middle square; and captions that lose their end
    token where they are too long, a blank where there is none.
    """
    boxes = [official_box(example.mask) for example in edited.batch.examples]

    def embed(pictures: Sequence[UInt8[np.ndarray, "H W 3"] | None]) -> Float[Array, "P D"]:
        def pixels(picture: np.ndarray | None, box: tuple[slice, slice] | None) -> Float[np.ndarray, "S S 3"]:
            if picture is None or box is None:
                return np.full((side, side, 3), np.nan, np.float32)
            return processed(picture[box], side)

        crops = np.stack([pixels(*pair) for pair in zip(pictures, boxes, strict=True)])
        return _embed_pictures(model, params, crops)

    side, model, params = folder.config.vision.image_size, CLIP(folder.config), _params(folder)
    captions = [example.caption or BLANK for example in edited.batch.examples]
    with jax.default_matmul_precision("highest"):
        return Vectors(
            embed(edited.pictures),
            embed([example.target for example in edited.batch.examples]),
            embed_texts(model, params, folder.tokenize(captions, keep_end=False)),
            np.array([box is None for box in boxes]),
        )


def official_box(mask: Float[np.ndarray, "H W"]) -> tuple[slice, slice] | None:
    """Rows and columns of the script's crop: the last of either is taken for the end, and lost; None if none is left.

    Args:
        mask: In [0, 1].
    """
    spans = [np.flatnonzero((mask > 0).any(axis=axis)) for axis in (1, 0)]
    if any(not len(span) or span[0] == span[-1] for span in spans):
        return None
    return tuple(slice(int(span[0]), int(span[-1])) for span in spans)


def region_vectors(
    binarise: Callable[[Float[Array, "P H W"]], Float[Array, "P H W"]], folder: CLIPFolder, edited: EditedBatch
) -> Vectors:
    """What the corrected variants show CLIP: the square window around the region, with a margin; captions keep their
    end.

    Args:
        binarise: Masks -> regions, NaN where there is none.
        folder: The model.
        edited: The edits; an example without caption, target or region has NaN.
    """
    batch, model, params = edited.batch, CLIP(folder.config), _params(folder)
    region = binarise(jnp.asarray(batch.masks))

    def embed(pictures: Sequence[UInt8[np.ndarray, "H W 3"] | None]) -> Float[Array, "P D"]:
        nothing = np.full((*region.shape[1:], 3), np.nan, np.float32)
        stacked = np.stack([nothing if x is None else np.float32(x) / 255 for x in pictures])
        found = embed_regions(model, params, jnp.asarray(stacked)[:, None], region, MARGIN)[:, 0]
        return jnp.where(jnp.isfinite(region[:, :1, 0]), found, jnp.nan)

    with jax.default_matmul_precision("highest"):
        of_captions = embed_texts(model, params, folder.tokenize([x.caption or BLANK for x in batch.examples]))
        there = np.array([example.has_caption for example in batch.examples])
        return Vectors(
            embed(edited.pictures),
            embed([example.target for example in batch.examples]),
            jnp.where(there[:, None], of_captions, jnp.nan),
            np.zeros(len(there), bool),
        )


def processed(picture: UInt8[np.ndarray, "h w 3"], side: int) -> Float[np.ndarray, "side side 3"]:
    """What CLIP's processor makes of a picture (transformers' `CLIPImageProcessorPil`), bit for bit.

    Its short side becomes `side` by Pillow's bicubic filter on 8 bits, the middle of the long one is kept, and the
    result is normalised.
    """
    height, width = picture.shape[:2]
    rows, columns = (int(side * length / min(height, width)) for length in (height, width))
    resized = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
    top, left = (rows - side) // 2, (columns - side) // 2
    return normalised(resized[top : top + side, left : left + side].astype(np.float32) / 255)


@partial(jax.jit, static_argnums=0)
def _embed_pictures(model: CLIP, params: dict, pixels: Float[Array, "P S S 3"]) -> Float[Array, "P D"]:
    vectors = model.apply({"params": params}, pixels, method=CLIP.embed_pictures)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _params(folder: CLIPFolder) -> dict:
    return folder.params_on(jax.sharding.get_mesh())
