"""RC-GRPO on FLUX.1-Kontext-dev at 1024 x 1024, on 64 chips, four a host.

    rcgrpo plan  --config configs/kontext_1024.py:v5e_64 --topology v5e:8x8
    rcgrpo train --config configs/kontext_1024.py:v5e_64 --workdir runs/kontext_1024 \
        --config.model.path=/data/kontext --config.data.path=/data/edits

Without a name after the colon the run is `v5e_64`. Both were planned by the command above, each with the topology that
stands in its row:

| name    | machine              | topology   | GiB a device   | s a step | samples an hour | bound by           |
|---------|----------------------|------------|----------------|----------|-----------------|--------------------|
| v5e_64  | 64 chips of v5e      | v5e:8x8    | 10.0 of 15.75  | 63.2     | 10,940          | compute            |
| v5p_128 | 64 chips of v5p      | v5p:4x4x4  | 11.3 of 95.74  | 27.0     | 25,560          | compute            |

A step is taken to reach half of the roofline. No machine has confirmed these plans; docs/plan.md says what they rest
on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import choose_row, kontext_1024

MACHINES = {
    # rollout, decode and update take so many at a time: of 192 candidates, as many again, and 256 anchor-steps
    "v5e_64": (64, 64, 64),
    "v5p_128": (64, 64, 64),
}


def get_config(machine: str = "v5e_64") -> ConfigDict:
    config = kontext_1024()
    rollout, decode, update = choose_row(MACHINES, machine)
    config.rollout.micro_batch, config.rollout.decode_micro_batch = rollout, decode
    config.surrogate.micro_batch = update
    return config
