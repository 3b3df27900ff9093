"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on one H100 of 80 GB.

    rcgrpo plan --config configs/kontext_512_h100.py --topology local   # on that machine

By count the base takes 22.2 GiB and the LoRA with its moments 1.6 GiB of the 80 GB. One prompt of this step with
micro-batches of 6 and 4 peaked at 29.0 GiB, rolled out in 6.8 s and updated in 3.4 s (docs/performance.md); what the
activations of the micro-batches below add has not been compiled or measured.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.training.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.rollout.micro_batch = 24  # of 48 candidates
    config.rollout.decode_micro_batch = 8
    config.surrogate.micro_batch = 16  # of 64 anchor-steps
    return config
