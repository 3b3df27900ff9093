"""Whether the edit region took the colour that the instruction names; needs no model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import ImageColor

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards.base import RewardInputs, register

# Linear sRGB to CIE XYZ, and the white point, both for D65 and the 2-degree observer (IEC 61966-2-1).
_XYZ_FROM_RGB = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]], np.float32
)
_WHITE = np.array([0.95047, 1.0, 1.08883], np.float32)
_LONGEST_NAME = 4  # words: "light golden rod yellow"


def lab_from_srgb(rgb: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """Converts sRGB to CIELAB (D65).

    Args:
        rgb: Gamma-encoded values in [0, 1].

    Returns:
        `L*` in [0, 100], and `a*`, `b*` in about [-110, 110]; float32.
    """
    linear = jnp.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = jnp.einsum("...c,xc->...x", linear, _XYZ_FROM_RGB / _WHITE[:, None], precision="highest")
    f = jnp.where(xyz > 0.008856, jnp.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def named_colour(instruction: str) -> str | None:
    """Finds the colour an instruction asks for, among the CSS names (`PIL.ImageColor.colormap`).

    Names are whole words in any case, and may be written apart ("light green", "dark-blue"): the longest name counts.
    Of several colours the last is the target, as in "turn the red ball blue"; so say "paint it red" last if another
    colour, or a word that CSS takes for one (snow, gold, chocolate), has to be mentioned too.

    Returns:
        The CSS name ("lightgreen"), or None if no colour is named.
    """
    words = re.findall(r"\w+|[^\w\s-]", instruction.casefold())  # punctuation is kept: it parts "pink, orange"
    found, i = None, 0
    while i < len(words):
        length = next((n for n in range(_LONGEST_NAME, 0, -1) if "".join(words[i : i + n]) in ImageColor.colormap), 0)
        found = "".join(words[i : i + length]) if length else found
        i += max(length, 1)
    return found


@jax.jit
def colour_score(
    edited: Float[Array, "P G H W 3"], mask: Float[Array, "P H W"], colour: Float[Array, "P 3"],
    scale: float, lightness: float,
) -> Float[Array, "P G"]:  # fmt: skip
    """Scores how near a region comes to a colour: the mask-weighted mean of `exp(-dE / scale)` (ours).

    `dE = sqrt((lightness dL)^2 + da^2 + db^2)` in CIELAB. Lightness is scaled down, for light and shade on an object
    change it without changing what one calls the object's colour.

    Args:
        edited: Candidates, sRGB in [0, 1].
        mask: The region, in [0, 1].
        colour: The colour wanted for each prompt, sRGB in [0, 1].
        scale: CIELAB units at which a pixel's score falls to 1 / e.
        lightness: The weight of lightness, 1 for the plain colour difference.

    Returns:
        Scores in [0, 1], float32; NaN for an empty mask.
    """
    difference = lab_from_srgb(edited) - lab_from_srgb(colour)[:, None, None, None, :]
    weighted = difference * jnp.array([lightness, 1.0, 1.0]).reshape(1, 1, 1, 1, 3)
    nearness = jnp.exp(-jnp.sqrt(jnp.sum(weighted**2, axis=-1)) / scale)
    return jnp.sum(mask[:, None] * nearness, axis=(-2, -1)) / jnp.sum(mask, axis=(-2, -1))[:, None]


@register("colour")
@dataclass(frozen=True)
class Colour:
    """Rewards a region that takes the colour its instruction names: `colour_score` with `named_colour`."""

    scale: float = 40.0  # CIELAB units; a grey pixel is about 100 from pure red, a shaded red one 35 to 55
    lightness: float = 0.5  # weight of lightness differences; above 0, or black and white would be one colour

    def validate(self, instruction: str) -> None:
        if named_colour(instruction) is None:
            raise UserError(
                f"instruction {instruction!r}: no colour is named; one such as 'red' or 'light blue' was wanted.",
                "Name a CSS colour in English in the instruction, or leave the colour reward out.",
            )

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        for instruction in inputs.instructions:
            self.validate(instruction)
        names = [named_colour(instruction) for instruction in inputs.instructions]
        colour = np.array([ImageColor.getrgb(name) for name in names], np.float32) / np.float32(255)
        return colour_score(inputs.edited, inputs.mask, colour, self.scale, self.lightness)
