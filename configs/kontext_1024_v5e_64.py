"""RC-GRPO on FLUX.1-Kontext-dev at 1024 x 1024, on a v5e-64.

    rcgrpo plan --config configs/kontext_1024_v5e_64.py --topology v5e:8x8

By that plan, which no machine has confirmed: 10.0 of 15.75 GiB a chip, 63.2 s a step at half of the roofline (compute),
10,940 samples an hour. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_1024


def get_config() -> ConfigDict:
    return kontext_1024()
