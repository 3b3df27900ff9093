"""The paper's stated settings at 512 x 512: region metric with taus 0.9 and 1.1, anchors re-integrated, all steps.

What the paper leaves to its (unpublished) appendix is as in `default_config`, where each such field says "ours".

    rcgrpo train --config configs/kontext_512_paper.py --workdir runs/paper \
        --config.model.path=/data/kontext --config.data.path=/data/edits --config.mesh.fsdp=8

Back-propagation through K = 8 steps costs about twice the update of `configs/kontext_512.py` and keeps the states of
all steps; memory and time on a device have not been measured.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.training.config import default_config
from rcgrpo_jax.training.recipes import as_in_paper


def get_config() -> ConfigDict:
    config = as_in_paper(default_config())
    config.surrogate.micro_batch = 8  # of 16 anchors
    config.rollout.micro_batch = 16
    config.rollout.decode_micro_batch = 16
    config.acd.layers = 10
    config.train.num_steps = 300
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
