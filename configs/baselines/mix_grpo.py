"""MixGRPO (arXiv 2507.21802) at 512 x 512: noise in a window of four steps that moves, Euler's steps around it.

    rcgrpo train --config configs/baselines/mix_grpo.py --workdir runs/mix_grpo \
        --config.model.path=/data/kontext --config.data.path=/data/edits

Of the paper, for FLUX: 25 steps, level 0.7, a window that moves by a step every 25 training steps, G 12, one initial
noise a group, clip 1e-4, 300 steps. It fine-tunes all weights at 1e-5. Here it is a LoRA, with the learning rate of its
LoRA on SD3.5.

Schedule, rewards and data are this project's, as in `configs/kontext_512.py`: docs/baselines.md says what else differs.
A step is 1,776 evaluations, 66.2 PFLOP (`configs/kontext_512.py`: 576, 21.5).

    rcgrpo plan --config configs/baselines/mix_grpo.py --topology h100:8

plans 8.6 of 72.78 GiB on each of 8 H100, and 16.8 s a step at half of the roofline. No machine has confirmed it.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.policy = "gaussian"
    config.explore.kind, config.explore.sigma = "global", 0.0  # one noise a group
    config.rollout.num_steps = 25
    config.sde.kind, config.sde.level = "flow_grpo", 0.7
    config.sde.window, config.sde.place, config.sde.interval, config.sde.stride = 4, "progressive", 25, 1
    config.objective.clip = 1e-4
    config.optimizer.learning_rate = 3e-4
    config.acd.weight = 0.0
    config.rollout.micro_batch, config.rollout.decode_micro_batch = 16, 16  # of 48 candidates
    config.surrogate.micro_batch = 16  # of 192 candidate-steps
    return config
