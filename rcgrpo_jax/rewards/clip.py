"""What CLIP says of a region: whether it shows what a text says, and whether it moved the way a text says.

Both rewards read a CLIP model from the folder or hub name in their option `path`. They look at the square window around
the region, `models.clip_vision.square_window`. An instruction says what to do and not what is to be seen, and CLIP was
trained on descriptions: where examples have a caption of the edited picture, `text=caption` asks for that.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.models.clip_vision import CLIP, crop, square_window
from rcgrpo_jax.rewards.base import RewardInputs, register
from rcgrpo_jax.weights.clip import load_clip

TEXTS = ("instruction", "caption")
SHORTEST = 1e-4  # of a difference of unit vectors: below is rounding, which has no direction


@partial(jax.jit, static_argnums=0)
def embed_regions(
    model: CLIP, params: dict, pictures: Float[Array, "P G H W 3"], mask: Float[Array, "P H W"], margin: float
) -> Float[Array, "P G D"]:
    """Computes the unit vectors of the windows around regions.

    Args:
        model: The network.
        params: Its parameters.
        pictures: sRGB in [0, 1].
        mask: The edit region of each prompt, in [0, 1].
        margin: As `square_window` has it.
    """
    side = model.config.vision.image_size

    def windows(pictures: Float[Array, "G H W 3"], mask: Float[Array, "H W"]) -> Float[Array, "G S S 3"]:
        corner, window = square_window(mask, margin)
        return jax.vmap(lambda picture: crop(picture, corner, window, side))(pictures)

    cut = jax.vmap(windows)(pictures, mask)
    vectors = model.apply({"params": params}, cut.reshape(-1, *cut.shape[2:]), method=CLIP.embed_pictures)
    return _unit(vectors).reshape(*cut.shape[:2], -1)


@partial(jax.jit, static_argnums=0)
def embed_texts(model: CLIP, params: dict, tokens: Int[Array, "B N"]) -> Float[Array, "B D"]:
    """Computes the unit vectors of texts."""
    return _unit(model.apply({"params": params}, tokens, method=CLIP.embed_texts))


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class CLIPReward:
    """A CLIP model, the window it is shown, and which text it is asked about.

    Raises:
        UserError: The model cannot be read.
        UsageError: No such text.
    """

    incidental = ("path",)  # its content counts

    def __init__(self, path: str, margin: float, text: str):
        if text not in TEXTS:
            raise UsageError(f"text: {text!r} found; one of {', '.join(TEXTS)} was wanted.", "Correct the option.")
        self.folder, self.margin, self.text = load_clip(path), margin, text
        self.model = CLIP(self.folder.config)
        self.needs_caption = text == "caption"

    def describe(self) -> dict[str, str]:
        return {"weights": self.folder.fingerprint}

    @property
    def params(self) -> dict:
        """The parameters on the mesh that is set."""
        return self.folder.params_on(jax.sharding.get_mesh())

    def texts(self, inputs: RewardInputs) -> tuple[str, ...]:
        return inputs.captions if self.needs_caption else inputs.instructions

    def of_texts(self, texts: tuple[str, ...]) -> Float[Array, "B D"]:
        return embed_texts(self.model, self.params, self.folder.tokenize(texts))

    def of_regions(self, pictures: Float[Array, "P G H W 3"], inputs: RewardInputs) -> Float[Array, "P G D"]:
        return embed_regions(self.model, self.params, pictures, inputs.mask, self.margin)


@register("clip_text")
class CLIPText(CLIPReward):
    """Rewards a region that shows what the text says: the cosine of CLIP's vectors of both, in [-1, 1].

    It is CLIPScore (Hessel et al. 2021) without its factor and its clamp at 0, of the window around the region.

    Args:
        path: Folder of a CLIP model, or its name on the hub.
        margin: Around the region, on either side, in longer sides of its bounding box.
        text: What to compare with: instruction, or caption, which examples must then have.
    """

    def __init__(self, path: str = "", margin: float = 0.25, text: str = "instruction"):
        super().__init__(path, margin, text)

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        wanted = self.of_texts(self.texts(inputs))
        return jnp.einsum("pgd,pd->pg", self.of_regions(inputs.edited, inputs), wanted)


@register("clip_direction")
class CLIPDirection(CLIPReward):
    """Rewards a region that moved as the text did: the cosine of the two differences of CLIP's vectors, in [-1, 1].

    `cos(E(edited) - E(source), E(text) - E(source_text))`, E the unit vectors of pictures and texts: the directional
    similarity of StyleGAN-NADA (Gal et al. 2022), by which InstructPix2Pix chose its data. There `source_text`
    describes the source of each example. Examples here have no such text, so one neutral text stands for all sources.
    A region whose vector did not move scores 0.

    Args:
        path: Folder of a CLIP model, or its name on the hub.
        margin: Around the region, on either side, in longer sides of its bounding box.
        text: Where the edit leads: instruction, or caption, which examples must then have.
        source_text: Where it starts from.
    """

    def __init__(self, path: str = "", margin: float = 0.25, text: str = "instruction", source_text: str = "a photo"):
        super().__init__(path, margin, text)
        self.source_text = source_text

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        *wanted, start = self.of_texts((*self.texts(inputs), self.source_text))
        text = _direction(jnp.stack(wanted) - start[None])
        moved = self.of_regions(inputs.edited, inputs) - self.of_regions(inputs.source[:, None], inputs)
        return jnp.einsum("pgd,pd->pg", _direction(moved), text)


def _direction(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors of unit length; zeros for those that are shorter than rounding. NaN stays NaN."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.where(length < SHORTEST, 0.0, x / jnp.maximum(length, SHORTEST))
