"""CoCoEdit (arXiv 2602.14068) at 512 x 512: DiffusionNFT with a penalty for what leaves the background.

    rcgrpo train --config configs/baselines/cocoedit.py --workdir runs/cocoedit \
        --config.model.path=/data/kontext --config.data.path=/data/edits

As `diffusion_nft.py`, which costs the same: 15,840 evaluations a step, and a judge beside it. The background is held to
the source, as the paper says. Its code holds it to the sample (`nft.keep_to=sample`), and has a second part that is off
here. Its reward is a judge's, 0.9, with 0.1 of the pixels' likeness outside the mask. Here `editscore` and
`preservation`, each standardised, have these weights. No average of the adapter is kept.
"""

from ml_collections import ConfigDict

from configs.baselines.diffusion_nft import get_config as diffusion_nft
from rcgrpo_jax.rl.recipes import judge_by_editscore


def get_config() -> ConfigDict:
    config = judge_by_editscore(diffusion_nft())
    config.acd.weight = 0.0
    config.rewards = ConfigDict({"editscore": 0.9, "preservation": 0.1})
    config.nft.keep_weight = 0.02
    config.optimizer.ema_decay = 0.0
    return config
