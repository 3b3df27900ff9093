"""What an evaluation measures of an edit: success inside the region, and an untouched background outside of it.

The background metrics have the form of CompBench's evaluator: of the whole frame, in which the edit region is set to
zero in both pictures, `image (1 - mask)`; edited against source.
"""

from __future__ import annotations

import dm_pix
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcgrpo_jax.evaluation.lpips import Layer, lpips
from rcgrpo_jax.rewards.oracle import FULL, oracle_scores

PSNR_CAP = 60.0  # dB, for equal backgrounds too: rounding to 8 bits alone leaves 59 dB of a whole frame

Pictures = Float[Array, "P H W 3"]
Masks = Float[Array, "P H W"]


def edit_scores(source: Pictures, edited: Pictures, mask: Masks, target: Pictures) -> dict[str, Float[Array, " P"]]:
    """The oracle's view of each edit (`rewards.oracle.oracle_scores`).

    Args:
        source: sRGB in [0, 1].
        edited: One edit of each.
        mask: The edit region, in [0, 1].
        target: The right results.

    Returns:
        `success` of the edit inside the region, and `overall`, in [0, 1], float32.
    """
    scores = oracle_scores(source, edited[:, None], mask, target)
    return {"success": scores["success"][:, 0] / FULL, "overall": scores["overall"][:, 0] / 10}


def background_scores(
    source: Pictures, edited: Pictures, mask: Masks, lpips_weights: tuple[Layer, ...] | None
) -> dict[str, Float[Array, " P"]]:
    """How far the background is that of the source, in CompBench's form.

    Args:
        source: sRGB in [0, 1].
        edited: One edit of each.
        mask: The edit region, in [0, 1].
        lpips_weights: As `lpips.load_weights` gives them; None leaves LPIPS out.

    Returns:
        `psnr` in dB, at most `PSNR_CAP`; `ssim` in [-1, 1] (11 x 11 Gaussian windows, mean over channels); `lpips` >= 0
        (AlexNet, where CompBench has SqueezeNet); float32.
    """
    outside = (1 - mask)[..., None]
    a, b = outside * source, outside * edited
    scores = {"psnr": jnp.minimum(dm_pix.psnr(a, b), PSNR_CAP), "ssim": dm_pix.ssim(a, b)}
    return scores if lpips_weights is None else scores | {"lpips": lpips(lpips_weights, a, b)}
