"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on a node of 8 H100.

    rcgrpo plan --config configs/kontext_512_8xh100.py --topology h100:8

By that plan, which no machine has confirmed: 14.5 of 72.78 GiB a GPU, 5.5 s a step at half of the roofline (compute),
31,470 samples an hour. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.rollout.micro_batch = 48  # all candidates, six a GPU
    config.rollout.decode_micro_batch = 16
    config.surrogate.micro_batch = 64  # all anchor-steps, eight a GPU
    return config
