"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on one GPU of 24 GB, with a base in NF4.

    rcgrpo plan --config configs/kontext_512_24gb.py --topology local   # on that machine

By count the base takes 6.0 GiB and the LoRA with its moments 1.6 GiB of the 24 GB; what the activations of these
micro-batches add has not been compiled or measured.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.training.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.model.quantization = "nf4"
    config.rollout.micro_batch = 4  # of 48 candidates, one of each group
    config.rollout.decode_micro_batch = 1
    config.surrogate.micro_batch = 2  # of 64 anchor-steps
    return config
