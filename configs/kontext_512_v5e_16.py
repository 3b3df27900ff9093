"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on a v5e-16.

    rcgrpo plan --config configs/kontext_512_v5e_16.py --topology v5e:4x4

By that plan, which no machine has confirmed: 7.9 of 15.75 GiB a chip, 13.8 s a step at half of the roofline (memory
and compute in balance), 12,510 samples an hour. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.rollout.micro_batch = 48  # of 48 candidates
    config.rollout.decode_micro_batch = 16
    config.surrogate.micro_batch = 32  # of 64 anchor-steps
    return config
