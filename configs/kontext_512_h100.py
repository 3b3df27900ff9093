"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, on one H100 of 80 GB.

    rcgrpo plan --config configs/kontext_512_h100.py --topology h100:1

By that plan, 41.8 of 72.78 GiB a GPU, 43.9 s a step at half of the roofline (compute), 3,934 samples an hour. One
prompt of this step with micro-batches of 6 and 4 was measured on an H100: it needed what its plan says within 0.3 GiB,
and ran at 54 % of the card's peak (rollout) and 39 % (update; 51 % with what checkpointing repeats), as
docs/performance.md has it.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.rollout.micro_batch = 24  # of 48 candidates
    config.rollout.decode_micro_batch = 8
    config.surrogate.micro_batch = 16  # of 64 anchor-steps
    return config
