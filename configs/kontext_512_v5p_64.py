"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on a v5p-64, 32 chips.

    rcgrpo plan --config configs/kontext_512_v5p_64.py --topology v5p:2x4x4

By that plan, which no machine has confirmed: 5.7 of 95.74 GiB a chip, 8.1 s a step at half of the roofline (memory),
42,600 samples an hour. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.rollout.prompts = 8  # 96 candidates, three a chip
    config.rollout.micro_batch = 32  # of 96 candidates
    config.rollout.decode_micro_batch = 32
    config.surrogate.micro_batch = 32  # of 128 anchor-steps
    return config
