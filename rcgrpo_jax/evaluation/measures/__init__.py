"""What is measured of an edit, a file a measure or a group. Importing this registers them, in a table's order."""

from rcgrpo_jax.evaluation.measures.acd import ACD
from rcgrpo_jax.evaluation.measures.base import (
    EDITOR,
    REGISTERED,
    Measure,
    MeasureInputs,
    MeasureOptions,
    choose,
    load_weights,
    note,
    register,
)
from rcgrpo_jax.evaluation.measures.caption import CAPTION
from rcgrpo_jax.evaluation.measures.lpips import LPIPS, LPIPS_VGG
from rcgrpo_jax.evaluation.measures.official import OFFICIAL
from rcgrpo_jax.evaluation.measures.overall import OVERALL
from rcgrpo_jax.evaluation.measures.psnr import PSNR
from rcgrpo_jax.evaluation.measures.region import REGION
from rcgrpo_jax.evaluation.measures.ssim import SSIM
from rcgrpo_jax.evaluation.measures.success import SUCCESS

# Those of the paper's Tables 2 and 3, success and caption standing for LC-I and LC-T, and two more. Then Table 1's.
for _measure in (SUCCESS, CAPTION, PSNR, SSIM, LPIPS, OVERALL, ACD, LPIPS_VGG, *OFFICIAL, *REGION):
    register(_measure)

__all__ = [
    "EDITOR", "REGISTERED", "Measure", "MeasureInputs", "MeasureOptions", "choose", "load_weights", "note",
    "register",
]  # fmt: skip
