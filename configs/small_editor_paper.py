"""The paper's stated settings on the small editor: RDP, region metric, anchors re-integrated, all steps, ACD.

    rcgrpo train --config configs/small_editor_paper.py --workdir runs/paper

What the paper leaves open is as in `configs/small_editor.py`.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.training.recipes import small_editor


def get_config() -> ConfigDict:
    config = small_editor()
    config.explore.kind = "region"
    config.explore.mask_dilation = 0
    config.surrogate.distance = "region"
    config.surrogate.tau_edit = 0.9
    config.surrogate.tau_base = 1.1
    config.surrogate.anchor_mode = "integrate"
    config.surrogate.steps = "all"
    config.surrogate.weighting = "uniform"
    config.acd.weight = 1.0
    return config
