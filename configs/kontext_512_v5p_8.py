"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on a v5p-8, four chips.

    rcgrpo plan --config configs/kontext_512_v5p_8.py --topology v5p:2x2x1

By that plan, which no machine has confirmed: 34.9 of 95.74 GiB a chip, 23.8 s a step at half of the roofline
(compute), 7,262 samples an hour. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.rollout.micro_batch = 48  # of 48 candidates
    config.rollout.decode_micro_batch = 16
    config.surrogate.micro_batch = 64  # of 64 anchor-steps
    return config
