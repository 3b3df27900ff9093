"""The paper's stated settings at 512 x 512: region metric with taus 0.9 and 1.1, anchors re-integrated, all steps.

What the paper leaves to its (unpublished) appendix is as in `default_config`, where each such field says "ours".

    rcgrpo train --config configs/kontext_512_paper.py --workdir runs/paper \
        --config.model.path=/data/kontext --config.data.path=/data/edits

Back-propagation through K = 8 steps costs about 2.7 times the update of `configs/kontext_512.py` by count of FLOPs, and
keeps the states of all steps; memory and time on a device have not been measured.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.training.recipes import as_in_paper, kontext_512


def get_config() -> ConfigDict:
    config = as_in_paper(kontext_512())
    config.rollout.micro_batch = 16  # of 48 candidates
    config.rollout.decode_micro_batch = 16
    config.surrogate.micro_batch = 8  # of 16 anchors
    return config
