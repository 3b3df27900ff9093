"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512.

    rcgrpo convert black-forest-labs/FLUX.1-Kontext-dev /data/kontext --dtype bfloat16
    rcgrpo train --config configs/kontext_512.py --workdir runs/kontext_512 \
        --config.model.path=/data/kontext --config.data.path=/data/edits --config.mesh.fsdp=8

Sizes, by count: the frozen base is 11.9 G parameters, 22.2 GiB in bfloat16 over `mesh.fsdp`; the LoRA is 104.6 M
parameters, 0.4 GiB in float32 and three times that with the optimizer's moments, on every device. One candidate's
rollout of 8 steps is about 300 TFLOP (2560 tokens). Memory and time on a device have not been measured.

The rewards here are the two that need no judge model; see README for what they can and cannot tell.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.rollout.micro_batch = 16  # of 48 candidates
    config.rollout.decode_micro_batch = 16
    config.surrogate.steps = "early"  # late steps hurt on a small model, and cost as much
    config.surrogate.micro_batch = 16  # of 64 anchor-steps
    config.train.num_steps = 300
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
