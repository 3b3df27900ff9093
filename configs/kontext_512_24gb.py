"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on one GPU of 24 GB, with a base in NF4.

    rcgrpo plan --config configs/kontext_512_24gb.py --topology rtx4090:1

By that plan, which no machine has confirmed: 17.5 of 22.08 GiB a GPU, 263.0 s a step at half of the roofline (compute),
657 samples an hour. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.model.quantization = "nf4"
    config.rollout.micro_batch = 4  # of 48 candidates, one of each group
    config.rollout.decode_micro_batch = 1
    config.surrogate.micro_batch = 2  # of 64 anchor-steps
    return config
