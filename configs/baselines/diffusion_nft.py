"""DiffusionNFT (arXiv 2509.16117) at 512 x 512, in the batch that CoCoEdit trains FLUX.1-Kontext with.

    rcgrpo train --config configs/baselines/diffusion_nft.py --workdir runs/diffusion_nft \
        --config.model.path=/data/kontext --config.data.path=/data/edits

b 1, nine of ten times, and the ramp of the old adapter are DiffusionNFT's. 24 groups of 12, K 10 and the LoRA on
attention are CoCoEdit's.

Schedule, rewards and data are this project's, as in `configs/kontext_512.py`: docs/baselines.md says what else differs.
A step is 15,840 evaluations, 579.3 PFLOP (`configs/kontext_512.py`: 576, 21.5).

    rcgrpo plan --config configs/baselines/diffusion_nft.py --topology h100:8

plans 8.6 of 72.78 GiB on each of 8 H100, and 148 s a step at half of the roofline. No machine has confirmed it.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.policy = "nft"
    config.explore.kind, config.explore.sigma = "global", 1.0  # every candidate has a noise of its own
    config.rollout.prompts, config.rollout.group_size, config.rollout.num_steps = 24, 12, 10
    config.rollout.solver = "dpmpp_2m"
    config.objective.advantage_std = "batch"
    config.lora.rank, config.lora.alpha = 32, 64.0
    config.optimizer.learning_rate, config.optimizer.ema_decay = 3e-4, 0.9
    config.acd.weight = 0.0
    config.rollout.micro_batch, config.rollout.decode_micro_batch = 48, 48  # of 288 candidates
    config.surrogate.micro_batch = 16  # of 2,592 candidates at a time
    return config
