"""Supervised fine-tuning of a LoRA for FLUX.1-Kontext-dev at 512 x 512, on your own triples.

    rcgrpo convert black-forest-labs/FLUX.1-Kontext-dev /data/kontext --dtype bfloat16
    rcgrpo sft --config configs/kontext_512_sft.py --workdir runs/kontext_512_sft \
        --config.model.path=/data/kontext --config.data.path=/data/triples --config.mesh.fsdp=8

Sizes, by count: the frozen base is 11.9 G parameters, 22.2 GiB in bfloat16 over `mesh.fsdp`; the LoRA is 104.6 M
parameters, 0.4 GiB in float32 and three times that with the optimizer's moments, on every device. One example is about
113 TFLOP: 2560 tokens forward, again for the rematerialised backward pass, and backward through frozen weights. Memory
and time on a device have not been measured.

The data need a target for every example; docs/pretraining.md shows the layout.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.sft.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.stage = "lora"
    config.batch.size = 16
    config.batch.micro_batch = 8  # examples: one a device on eight
    config.optimizer.warmup_steps = 50
    config.train.num_steps = 1000
    config.train.save_every = 50
    config.train.image_every = 50
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
