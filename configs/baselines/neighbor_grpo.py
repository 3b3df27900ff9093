"""Neighbor GRPO (arXiv 2511.16955) at 512 x 512: noise is perturbed everywhere, rollouts are DPM-Solver++(2M).

    rcgrpo train --config configs/baselines/neighbor_grpo.py --workdir runs/neighbor_grpo \
        --config.model.path=/data/kontext --config.data.path=/data/edits

Of the paper: G 12, B 4, sigma 0.3, 8 steps of 2M in the rollout and one of Euler's from a stored state in the update,
quasi-norm 0.8, 1e-5 as the learning rate, 300 steps. Four steps are trained. Which four, the clip and the number of
prompts are not public, and no code is. Its softmax is of `-d^2`. Here it is of `-d^2 / 2` (Eq. 7).

Schedule, rewards and data are this project's, as in `configs/kontext_512.py`: docs/baselines.md says what else differs.
A step is 576 evaluations, 21.5 PFLOP (`configs/kontext_512.py`: 576, 21.5).

    rcgrpo plan --config configs/baselines/neighbor_grpo.py --topology h100:8

plans 8.4 of 72.78 GiB on each of 8 H100, and 5.5 s a step at half of the roofline. On a v5e-16 (`v5e:4x4`) it is 6.1 of
15.75 GiB and 16.2 s. No machine has confirmed it.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import kontext_512


def get_config() -> ConfigDict:
    config = kontext_512()
    config.explore.kind, config.explore.sigma = "global", 0.3
    config.rollout.solver = "dpmpp_2m"
    config.objective.quasi_norm = 0.8
    config.optimizer.learning_rate = 1e-5
    config.acd.weight = 0.0
    config.rollout.micro_batch, config.rollout.decode_micro_batch = 16, 16  # of 48 candidates
    config.surrogate.micro_batch = 16  # of 64 anchor-steps
    return config
