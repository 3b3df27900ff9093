"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on a v5e-4: four chips of 16 GB, with an int8 base.

    rcgrpo plan --config configs/kontext_512_v5e_4.py --topology v5e:2x2

By that plan, which no machine has confirmed: 11.7 of 15.75 GiB a chip, 55.6 s a step at half of the roofline (compute),
3,106 samples an hour. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.model.quantization = "int8"
    config.rollout.micro_batch = 16  # of 48 candidates
    config.rollout.decode_micro_batch = 8
    config.surrogate.micro_batch = 16  # of 64 anchor-steps
    return config
