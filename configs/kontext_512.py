"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512, in micro-batches that 8 to 16 devices of 16 GB hold.

    rcgrpo convert black-forest-labs/FLUX.1-Kontext-dev /data/kontext --dtype bfloat16
    rcgrpo train --config configs/kontext_512.py --workdir runs/kontext_512 \
        --config.model.path=/data/kontext --config.data.path=/data/edits

The same run in the micro-batches of one machine, with its plan: `configs/kontext_512_*.py` of v5e_16, v5p_8, v6e_8,
h100 and 8xh100; of v5p_64 with 8 prompts; of v5e_4 (int8) and 24gb (NF4) with a base in fewer bits.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.rollout.micro_batch = 16  # of 48 candidates
    config.rollout.decode_micro_batch = 16
    config.surrogate.micro_batch = 16  # of 64 anchor-steps
    return config
