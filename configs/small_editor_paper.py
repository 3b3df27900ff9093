"""The paper's settings on the small editor: RDP, region metric, anchors re-integrated, all steps, ACD.

    rcgrpo train --config configs/small_editor_paper.py --workdir runs/paper

What the paper leaves open is as in `configs/small_editor_balanced.py`.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import as_in_paper, small_editor_balanced


def get_config() -> ConfigDict:
    config = as_in_paper(small_editor_balanced())
    config.rewards.preservation = 0.0  # the judge's score alone, beside ACD's
    return config
