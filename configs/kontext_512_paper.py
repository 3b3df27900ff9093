"""The paper's stated settings at 512 x 512: region metric with taus 0.9 and 1.1, anchors re-integrated, all steps.

The rewards are EditScore and ACD. `configs/kontext_512_editscore.py` says how to serve the judge and what it costs.

What the paper leaves to its (unpublished) appendix is as in `default_config`, where each such field says "ours".

    rcgrpo train --config configs/kontext_512_paper.py --workdir runs/paper \
        --config.model.path=/data/kontext --config.data.path=/data/edits \
        --config.reward_options.editscore.urls=http://judge:8000/v1

Back-propagation through K = 8 steps costs 2.7 times the update of `configs/kontext_512.py`, and keeps the states of all
steps. On a v5e-16,

    rcgrpo plan --config configs/kontext_512_paper.py --topology v5e:4x4

plans 6.0 of 15.75 GiB a chip, 23.7 s a step at half of the roofline (network and compute), 7,285 samples an hour; no
machine has confirmed it. docs/plan.md says what these rest on.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import as_in_paper, judge_by_editscore, kontext_512


def get_config() -> ConfigDict:
    config = judge_by_editscore(as_in_paper(kontext_512()))
    config.rollout.micro_batch = 16  # of 48 candidates
    config.rollout.decode_micro_batch = 16
    config.surrogate.micro_batch = 16  # all anchors
    return config
