"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on a v6e-8.

    rcgrpo plan --config configs/kontext_512_v6e_8.py --topology v6e:2x4

By that plan, which no machine has confirmed: 9.7 of 31.25 GiB a chip, 8.7 s a step at half of the roofline (network
and memory), 19,800 samples an hour. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.rollout.micro_batch = 16  # of 48 candidates
    config.rollout.decode_micro_batch = 16
    config.surrogate.micro_batch = 16  # of 64 anchor-steps
    return config
