"""Flow-GRPO-Fast with Flow-CPS (arXiv 2509.05952) at 512 x 512, as flow_grpo's code trains FLUX.

    rcgrpo train --config configs/baselines/flow_grpo_fast.py --workdir runs/flow_grpo_fast \
        --config.model.path=/data/kontext --config.data.path=/data/edits

Noise enters the first three of six steps, and only these are trained. Batch, LoRA and optimizer are those of
`flow_grpo.py`, which are Kontext's.

Schedule, rewards and data are this project's, as in `configs/kontext_512.py`: docs/baselines.md says what else differs.
A step is 7,560 evaluations, 233.0 PFLOP (`configs/kontext_512.py`: 576, 21.5).

    rcgrpo plan --config configs/baselines/flow_grpo_fast.py --topology h100:8

plans 13.2 of 72.78 GiB on each of 8 H100, and 60 s a step at half of the roofline. No machine has confirmed it.
"""

from ml_collections import ConfigDict

from configs.baselines.flow_grpo import get_config as flow_grpo


def get_config() -> ConfigDict:
    config = flow_grpo()
    config.sde.kind, config.sde.level, config.sde.log_prob = "cps", 0.8, "published"
    config.sde.window, config.sde.place, config.sde.range_end = 3, "random", 3
    config.objective.clip = 1e-5
    return config
