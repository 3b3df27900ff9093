"""CLIP with both towers: pictures and texts as vectors of one space.

A leaf's path, joined with dots, is its key in transformers' `CLIPModel`; layers are stacked on a leading axis.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rcgrpo_jax.models.clip import Encoder, Part, TextModel
from rcgrpo_jax.models.config import CLIPConfig

# Of the training pictures, for channels in [0, 1]; all released models have them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(pictures: Float[Array, "... 3"]) -> Float[Array, "... 3"]:
    """Pictures in [0, 1] as the vision tower reads them: `(x - MEAN) / STD`."""
    mean, std = (np.array(x, np.float32).reshape(*(1,) * (pictures.ndim - 1), 3) for x in (MEAN, STD))
    return (pictures - mean) / std


def square_window(mask: Float[Array, "H W"], margin: float) -> tuple[Float[Array, " 2"], Float[Array, ""]]:
    """Finds the square window around a region: corner (row, column) and side, in pixels.

    The side is `(1 + 2 margin)` times the longer side of the bounding box of what is above 0 in the mask, and that of
    the picture's shorter side at most. The window is centred on the box, and moved into the picture.

    Args:
        mask: In [0, 1]; one without a region is taken as a whole.
        margin: On either side, in longer sides of the box.
    """
    inside = mask > 0
    spans = []
    for axis, length in ((1, mask.shape[0]), (0, mask.shape[1])):
        present = jnp.any(inside, axis=axis)
        spans.append((jnp.argmax(present), length - jnp.argmax(present[::-1])))
    (top, bottom), (left, right) = spans
    longest = jnp.maximum(bottom - top, right - left)
    side = jnp.minimum(longest * (1 + 2 * margin), min(mask.shape))
    centre = jnp.stack([top + bottom, left + right]) / 2
    corner = jnp.clip(centre - side / 2, 0, jnp.array(mask.shape) - side)
    return corner, side


def crop(
    picture: Float[Array, "H W 3"], corner: Float[Array, " 2"], window: Float[Array, ""], side: int
) -> Float[Array, "side side 3"]:
    """What CLIP's processor makes of a square window of a picture: resized by Pillow's bicubic, normalised.

    Of the centred window as large as the picture allows, which is `square_window` of a mask of ones, it is the
    processor's result for the picture, to 2 / 255 before normalisation: Pillow rounds to 8 bits after either axis, and
    this does not. Where a window has a surrounding, the outermost pixels of the result see some of it.

    Args:
        picture: sRGB in [0, 1].
        corner: Row and column of the window, pixels.
        window: Its side, pixels.
        side: Of the result.
    """
    scale = side / window
    resized = jax.image.scale_and_translate(
        picture, (side, side, 3), (0, 1), jnp.stack([scale, scale]), -corner * scale, "cubic"
    )
    return normalised(jnp.clip(resized, 0, 1))


class _VisionEmbeddings(Part):
    """A vector for each patch after the class token's, with their positions."""

    @nn.compact
    def __call__(self, pictures: Float[Array, "B S S 3"]) -> Float[Array, "B N C"]:
        config = self.config
        patch = (config.patch_size, config.patch_size)
        conv = nn.Conv(config.hidden_size, patch, patch, "VALID", use_bias=False, **self.dtypes, name="patch_embedding")
        patches = conv(pictures).reshape(len(pictures), -1, config.hidden_size)
        token = self.param("class_embedding", nn.initializers.normal(), (config.hidden_size,), self.param_dtype)
        tokens = jnp.broadcast_to(token.astype(patches.dtype), (len(pictures), 1, config.hidden_size))
        position = nn.Embed(config.num_positions, config.hidden_size, **self.dtypes, name="position_embedding")
        return jnp.concatenate([tokens, patches], axis=1) + position(jnp.arange(config.num_positions))[None]


class _VisionModel(Part):
    """Embeddings, encoder, and the last norm of the class token."""

    @nn.compact
    def __call__(self, pictures: Float[Array, "B S S 3"]) -> Float[Array, "B C"]:
        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(self.config.layer_norm_eps, use_fast_variance=False, **self.dtypes, name=name)

        x = _VisionEmbeddings(self.config, **self.dtypes, name="embeddings")(pictures)
        x = norm("pre_layrnorm")(x)  # spelt so in every released file
        x = Encoder(self.config, **self.dtypes, name="encoder")(x)
        return norm("post_layernorm")(x[:, 0])


class CLIP(nn.Module):
    """Both towers; `__call__` is for `init`, and the two others are called by `apply(..., method=)`.

    Attributes:
        config: Widths and depths.
        dtype: The dtype of activations and results.
        param_dtype: The dtype of the parameters.
    """

    config: CLIPConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.text_model = TextModel(self.config.text, **dtypes)
        self.vision_model = _VisionModel(self.config.vision, **dtypes)
        self.text_projection = nn.Dense(self.config.projection_dim, use_bias=False, **dtypes)
        self.visual_projection = nn.Dense(self.config.projection_dim, use_bias=False, **dtypes)

    def embed_texts(self, tokens: Int[Array, "B N"]) -> Float[Array, "B D"]:
        """Vectors of texts; `tokens` as for `models.clip.CLIPTextEncoder`."""
        return self.text_projection(self.text_model(tokens))

    def embed_pictures(self, pictures: Float[Array, "B S S 3"]) -> Float[Array, "B D"]:
        """Vectors of pictures as `crop` gives them, of `vision.image_size` pixels a side."""
        return self.visual_projection(self.vision_model(pictures))

    def __call__(
        self, tokens: Int[Array, "B N"], pictures: Float[Array, "B S S 3"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        return self.embed_texts(tokens), self.embed_pictures(pictures)
