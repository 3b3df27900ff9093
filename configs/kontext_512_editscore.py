"""RC-GRPO on FLUX.1-Kontext-dev at 512 x 512 with the paper's rewards: EditScore, and attention in the region (ACD).

    bash launch/editscore.sh EDITSCORE_LORA --gpus 0    # on a machine of its own, named judge here
    rcgrpo judge --reward editscore --option model=editscore --option urls=http://judge:8000/v1 \
        --data /data/edits --targets --sources --limit 50
    rcgrpo train --config configs/kontext_512_editscore.py:8xh100 --workdir runs/kontext_512_editscore \
        --config.model.path=/data/kontext --config.data.path=/data/edits \
        --config.reward_options.editscore.urls=http://judge:8000/v1

The name after the colon is a machine, a row of the table in `configs/kontext_512.py`, with its memory and its seconds a
step. The judge's GPUs come on top: by count, 8 G parameters are 16 GB in bfloat16, beside the server's cache.

A step asks 96 times: 48 candidates, two questions each. At 512 x 512 a question has about 1,000 tokens and its answer
512 at most. A server with 64 slots takes them in 1.5 waves. What that takes in seconds has not been measured. It counts
only as far as it is longer than the rollout of the next micro-batch; `judge/editscore/seconds_p95` of a run tells.
"""

from ml_collections import ConfigDict

from configs.kontext_512 import get_config as kontext_512
from rcgrpo_jax.rl.recipes import judge_by_editscore


def get_config(machine: str = "default") -> ConfigDict:
    return judge_by_editscore(kontext_512(machine))
