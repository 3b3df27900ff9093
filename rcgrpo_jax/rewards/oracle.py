"""A judge of edits whose right result is known: EditScore's form, with pixels compared in place of a model asked."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from jaxtyping import Array, Float, UInt32

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards.base import RewardInputs, register
from rcgrpo_jax.rewards.colour import lab_from_srgb
from rcgrpo_jax.rewards.preservation import masked_psnr

FULL = 25.0  # the best sub-score, as EditScore's
VISIBLE = 12.0  # CIELAB units of difference that are plainly seen
TOLERANCE = 30.0  # CIELAB units at which a match falls to 1 / e
PSNR_FULL = 35.0  # dB of background that count as untouched
WRONG_COLOUR = 0.2  # of the success, for a change in the right place with none of the right colour
RIM = 3 / 64  # sides of the picture: width of the band around the region

Picture = Float[Array, "*batch H W 3"]
Map = Float[Array, "*batch H W"]


def oracle_scores(
    source: Float[Array, "P H W 3"], edited: Float[Array, "P G H W 3"], mask: Float[Array, "P H W"],
    target: Float[Array, "P H W 3"],
) -> dict[str, Float[Array, "P G"]]:  # fmt: skip
    """Computes four sub-scores in [0, 25] and EditScore's overall score from them (the measures are ours).

    `dE` is the colour difference in CIELAB, `seen(d) = 1 - exp(-(d / 12)^2)`, M the mask.
      - `success`: `25 change (0.2 + 0.8 match)`. `change` is how well what changed overlaps what was to change: the
        soft intersection over union of `seen(dE(edited, source))` and `seen(dE(target, source))` in M. `match` is the
        mean of `exp(-dE(edited, target) / 30)` in M, weighted by what was to change.
      - `preservation`: 25 times the mean of `min(PSNR / 35, 1)` outside M and `1 / (1 + a)`; `a` is the area outside M
        that visibly changed, in units of the area of M. Differences are averaged over 5 x 5 pixels before they are
        seen, so that fine noise and lost texture count in the PSNR alone.
      - `naturalness`: 25 times the mean of `exp(-dE(edited, source) / 30)` over a band around M: halos and seams.
      - `artefacts`: `25 exp(-4 e)`; `e` is how far `seen` of the local contrast of lightness lies outside the range of
        the source's and the target's, meaned over the picture: edges that neither has, or both have and the edit lacks.

    Args:
        source: sRGB in [0, 1].
        edited: Candidates.
        mask: The edit region, in [0, 1].
        target: The right result.

    Returns:
        The four by name, and `overall = sqrt(SC PQ)` in [0, 10] with `SC = min(success, preservation) / 2.5` and
        `PQ = min(naturalness, artefacts) / 2.5`; float32. NaN for a candidate with a NaN pixel.
    """
    masks = jnp.broadcast_to(mask[:, None], edited.shape[:-1])
    sources = jnp.broadcast_to(source[:, None], edited.shape)
    source_lab, target_lab, lab = (lab_from_srgb(picture) for picture in (source[:, None], target[:, None], edited))
    from_source, from_target = _difference(lab, source_lab), _difference(lab, target_lab)
    wanted, changed = _seen(_difference(target_lab, source_lab)), _seen(from_source)

    overlap, union = jnp.minimum(wanted, changed), jnp.maximum(wanted, changed)
    change = _total(masks * overlap) / jnp.maximum(_total(masks * union), 1e-6)
    match = _mean(jnp.exp(-from_target / TOLERANCE), masks * wanted)
    background = 1 - masks
    spilled = _seen(jnp.linalg.norm(_smooth(background[..., None] * (lab - source_lab)), axis=-1))
    area = _total(background * spilled) / jnp.maximum(_total(masks), 1e-6)
    untouched = jnp.clip(masked_psnr(sources, edited, masks) / PSNR_FULL, 0, 1)
    rim = _dilate(masks, max(round(RIM * mask.shape[-1]), 1)) - masks
    contrast, of_source, of_target = (_seen(_contrast(picture[..., 0])) for picture in (lab, source_lab, target_lab))
    low, high = jnp.minimum(of_source, of_target), jnp.maximum(of_source, of_target)
    excess = jnp.maximum(jnp.maximum(low - contrast, contrast - high), 0)

    scores = {
        "success": FULL * change * (WRONG_COLOUR + (1 - WRONG_COLOUR) * match),
        "preservation": FULL * (untouched + 1 / (1 + area)) / 2,
        "naturalness": FULL * (1 - _mean(1 - jnp.exp(-from_source / TOLERANCE), rim)),  # 25 for an empty band
        "artefacts": FULL * jnp.exp(-4 * jnp.mean(excess, axis=(-2, -1))),
    }
    consistency = jnp.minimum(scores["success"], scores["preservation"]) / 2.5
    quality = jnp.minimum(scores["naturalness"], scores["artefacts"]) / 2.5
    return scores | {"overall": jnp.sqrt(consistency * quality)}


@register("oracle")
@dataclass(frozen=True)
class Oracle:
    """Rewards edits that come near a known right result: `oracle_scores`' overall score / 10, in [0, 1].

    For tasks whose target is rendered, as those of `data.scenes`: a stand-in for a judge of real edits, a black box to
    the method, free of a judge's mistakes, which `noise` can put back.
    """

    noise: float = 0.0  # standard deviation of a judge's error, in units of the reward; the sum is clipped to [0, 1]
    needs_target = True
    seed: int = 0  # of the noise, which depends on nothing else but the candidate's pixels and the instruction
    num_pass: Annotated[int, Ge(1)] = 1  # answers that are averaged, each with an error of its own, of seed + pass

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        if inputs.targets is None:
            raise UserError(
                "The oracle was given no targets; the right result of every edit was wanted.",
                "Train on examples with targets, such as data.path = scenes:train, or choose another reward.",
            )
        rewards = _overall(inputs.source, inputs.edited, inputs.mask, inputs.targets) / 10
        if not self.noise:
            return rewards
        salt = np.array([zlib.crc32(instruction.encode()) for instruction in inputs.instructions], np.uint32)
        answers = [
            jnp.clip(rewards + self.noise * _noise(np.uint32((self.seed + i) % 2**32), salt, inputs.edited), 0, 1)
            for i in range(self.num_pass)
        ]
        return sum(answers) / self.num_pass


@jax.jit
def _overall(
    source: Float[Array, "P H W 3"], edited: Float[Array, "P G H W 3"], mask: Float[Array, "P H W"],
    target: Float[Array, "P H W 3"],
) -> Float[Array, "P G"]:  # fmt: skip
    return oracle_scores(source, edited, mask, target)["overall"]


@jax.jit
def _noise(seed: np.uint32, salt: UInt32[Array, " P"], edited: Float[Array, "P G H W 3"]) -> Float[Array, "P G"]:
    """Draws a standard normal value for each candidate from the bits of its pixels, whatever else is in the batch."""
    bits = jax.lax.bitcast_convert_type(edited.astype(jnp.float32), jnp.uint32)
    content = jnp.sum(bits, axis=(-3, -2, -1), dtype=jnp.uint32)  # of integers: the order of the sum does not matter
    key = jax.random.key(seed)

    def draw(salt: UInt32[Array, ""], content: UInt32[Array, ""]) -> Float[Array, ""]:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, salt), content))

    return jax.vmap(jax.vmap(draw, (None, 0)))(salt, content)


def _difference(a: Picture, b: Picture) -> Map:
    return jnp.sqrt(jnp.sum((a - b) ** 2, axis=-1))


def _seen(difference: Map) -> Map:
    return 1 - jnp.exp(-((difference / VISIBLE) ** 2))


def _contrast(lightness: Map) -> Map:
    """The difference to the next pixel below and to the right, root of the sum of squares; 0 past the border."""
    down = jnp.diff(lightness, axis=-2, append=lightness[..., -1:, :])
    right = jnp.diff(lightness, axis=-1, append=lightness[..., -1:])
    return jnp.sqrt(down**2 + right**2)


def _smooth(picture: Picture, side: int = 5) -> Picture:
    """The mean over a square window, with zeros past the border."""
    window = (1,) * (picture.ndim - 3) + (side, side, 1)
    return jax.lax.reduce_window(picture, 0.0, jax.lax.add, window, (1,) * picture.ndim, "SAME") / side**2


def _dilate(mask: Map, radius: int) -> Map:
    """The greatest value within a square of `2 radius + 1` pixels a side."""
    window = (1,) * (mask.ndim - 2) + (2 * radius + 1,) * 2
    return jax.lax.reduce_window(mask, -jnp.inf, jax.lax.max, window, (1,) * mask.ndim, "SAME")


def _total(values: Map) -> Float[Array, "*batch"]:
    return jnp.sum(values, axis=(-2, -1))


def _mean(values: Map, weights: Map) -> Float[Array, "*batch"]:
    return _total(values * weights) / jnp.maximum(_total(jnp.broadcast_to(weights, values.shape)), 1e-6)
