"""Whole runs whose candidates share tokens: they go on bit for bit, on several processes too."""

import pytest
import small_run
from test_distributed import assert_same_adapter, finish, start
from test_plan import workload
from test_resume import assert_bit_equal

from rcgrpo_jax.rl.trainer import train

# The masks of the data are 9, 6 and 6 of 16 tokens.
SETTINGS = {
    "rollout__share": "region", "rollout__share_grow": 0, "rollout__share_grow_reference": -1,
    "surrogate__share": "region", "explore__alpha_base": 0.0, "optimizer__learning_rate": 1e-3,
}  # fmt: skip
WHOLE = SETTINGS | {"rollout__prompts": 4, "mesh__fsdp": 2, "objective__updates": 2, "train__num_steps": 3}

pytestmark = pytest.mark.slow


def test_two_and_two_steps_are_four(tmp_path):
    straight = train(small_run.make_config(**SETTINGS), tmp_path / "straight")
    train(small_run.make_config(**SETTINGS, train__num_steps=2), tmp_path / "run")
    assert_bit_equal(train(small_run.make_config(**SETTINGS), tmp_path / "run"), straight)
    exact = {name: value for name, value in SETTINGS.items() if "share" not in name}
    other = train(small_run.make_config(**exact), tmp_path / "exact")
    with pytest.raises(AssertionError):
        assert_bit_equal(other, straight)


def test_two_processes_are_one_run(tmp_path):
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    train(small_run.make_config(**WHOLE), alone)
    config = small_run.config_file(tmp_path / "config.py", **WHOLE)
    ended = finish(start(config, workdir, 2), tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    found, wanted = (small_run.metrics_without_times(path) for path in (workdir, alone))
    for line, expected in zip(found, wanted, strict=True):
        assert line["room"] == 12  # of 32 tokens
        assert line == pytest.approx(expected, rel=2e-3, abs=2e-6)
    assert_same_adapter(workdir, alone, tmp_path)


def test_the_plan_counts_what_is_compiled():
    planned = workload(**SETTINGS)
    assert planned.own_tokens
    ratios = {name: (plan := planned.compile(name)).cost.flops / plan.analytic for name in ("rollout", "update")}
    assert ratios["rollout"] == pytest.approx(1, rel=0.05)
    assert 0.8 < ratios["update"] < 1.1
