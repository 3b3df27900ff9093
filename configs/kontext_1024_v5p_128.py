"""RC-GRPO on FLUX.1-Kontext-dev at 1024 x 1024, on a v5p-128, 64 chips.

    rcgrpo plan --config configs/kontext_1024_v5p_128.py --topology v5p:4x4x4

By that plan, which no machine has confirmed: 11.3 of 95.74 GiB a chip, 27.0 s a step at half of the roofline (compute),
25,560 samples an hour. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_1024


def get_config() -> ConfigDict:
    return kontext_1024()
