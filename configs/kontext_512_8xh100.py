"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on a node of 8 H100.

    rcgrpo plan --config configs/kontext_512_8xh100.py --topology local   # on that machine

By count a GPU's share of the base is 2.8 GiB and the LoRA with its moments takes 1.6 GiB of the 80 GB; what the
activations of these micro-batches add has not been compiled or measured.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.training.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.rollout.micro_batch = 48  # all candidates, six a GPU
    config.rollout.decode_micro_batch = 16
    config.surrogate.micro_batch = 64  # all anchor-steps, eight a GPU
    return config
