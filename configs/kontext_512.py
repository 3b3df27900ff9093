"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512: one run, in the micro-batches of one machine each.

    rcgrpo convert black-forest-labs/FLUX.1-Kontext-dev /data/kontext --dtype bfloat16
    rcgrpo plan  --config configs/kontext_512.py:v5e_16 --topology v5e:4x4
    rcgrpo train --config configs/kontext_512.py:v5e_16 --workdir runs/kontext_512 \
        --config.model.path=/data/kontext --config.data.path=/data/edits

Without a name after the colon the run is `default`: 8 to 16 devices of 16 GB hold its micro-batches. The others were
planned by the command above, each with the topology that stands in its row:

| name    | machine              | topology   | GiB a device   | s a step | samples an hour | bound by           |
|---------|----------------------|------------|----------------|----------|-----------------|--------------------|
| v5e_16  | 16 chips of v5e      | v5e:4x4    | 7.9 of 15.75   | 13.8     | 12,510          | memory and compute |
| v5e_4   | 4 of v5e, int8 base  | v5e:2x2    | 11.7 of 15.75  | 55.6     | 3,106           | compute            |
| v6e_8   | 8 chips of v6e       | v6e:2x4    | 9.7 of 31.25   | 8.7      | 19,800          | network and memory |
| v5p_8   | 4 chips of v5p       | v5p:2x2x1  | 34.9 of 95.74  | 23.8     | 7,262           | compute            |
| v5p_64  | 32 of v5p, 8 prompts | v5p:2x4x4  | 5.7 of 95.74   | 8.1      | 42,600          | memory             |
| h100    | one H100 of 80 GB    | h100:1     | 41.8 of 72.78  | 43.9     | 3,934           | compute            |
| 8xh100  | 8 H100               | h100:8     | 14.5 of 72.78  | 5.5      | 31,470          | compute            |
| 24gb    | one GPU, NF4 base    | rtx4090:1  | 17.5 of 22.08  | 263.0    | 657             | compute            |

A step is taken to reach half of the roofline. No machine has confirmed these plans but for the H100's: one prompt of
this step with micro-batches of 6 and 4 needed what its plan says within 0.3 GiB, and ran at 54 % of the card's peak
(rollout) and 39 % (update; 51 % with what checkpointing repeats). docs/plan.md says what the plans rest on, and
docs/performance.md has that measurement.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import choose_row, kontext_512

MACHINES = {
    # rollout, decode and update take so many at a time: of 48 candidates, as many again, and 64 anchor-steps
    "default": (16, 16, 16, {}),
    "v5e_16": (48, 16, 32, {}),
    "v5e_4": (16, 8, 16, {"model.quantization": "int8"}),
    "v6e_8": (16, 16, 16, {}),
    "v5p_8": (48, 16, 64, {}),
    "v5p_64": (32, 32, 32, {"rollout.prompts": 8}),  # of 96 candidates, three a chip, and 128 anchor-steps
    "h100": (24, 8, 16, {}),
    "8xh100": (48, 16, 64, {}),  # all: six candidates and eight anchor-steps a GPU
    "24gb": (4, 1, 2, {"model.quantization": "nf4"}),  # one candidate of each group
}


def get_config(machine: str = "default") -> ConfigDict:
    config = kontext_512()
    rollout, decode, update, changes = choose_row(MACHINES, machine)
    config.rollout.micro_batch, config.rollout.decode_micro_batch = rollout, decode
    config.surrogate.micro_batch = update
    config.update_from_flattened_dict(changes)
    return config
