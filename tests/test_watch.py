"""Rewards that are watched, weights that follow a schedule, and what a step says of its rewards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from ml_collections import ConfigDict

from rcgrpo_jax import rewards
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.method import grpo
from rcgrpo_jax.options import read_options
from rcgrpo_jax.rl.config import MAY_DIFFER, default_config, validate
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.reward_fields import Schedule, unlearned
from rcgrpo_jax.rl.setup import make_rewards
from rcgrpo_jax.rl.step_metrics import correlation_metrics, drift_metrics, reward_metrics, watch_metrics
from rcgrpo_jax.rl.trainer import Trainer, train
from rcgrpo_jax.runs.differences import check_same_config


@functools.cache
def make_trainer(**changes) -> Trainer:
    """As `small_run.make_trainer`, with the rewards that a set-up makes."""
    config = small_run.make_config(**changes)
    editor, mesh = small_run.load_editor((1, 1, 1), "float32")
    validate(config, 1)
    with jax.set_mesh(mesh):
        options = read_options(Options, config)
        return Trainer(options, editor, mesh, make_rewards(options))


# Watched rewards


class Down(rewards.Reward):
    """A server that never answers."""

    def start(self, inputs):
        raise rewards.Unscored("down")


def test_what_is_watched_is_reported_and_never_learned_from(monkeypatch):
    """Nor does it drop a group, or end the run, where it has no scores."""
    monkeypatch.setattr(rewards.base, "_FACTORIES", {**rewards.factories(), "down": Down})
    plain, watching = make_trainer(), make_trainer(watch="change, down")
    batch, state = small_run.make_batch(plain), small_run.make_state(plain)
    learned, measured, _ = small_run.take_step(plain, state, batch)
    for _ in range(4):
        also, seen, _ = small_run.take_step(watching, state, batch)
    jax.tree.map(np.testing.assert_array_equal, learned.params, also.params)
    added = {
        "watch/change", "watch_std/change", "watch_failed/change", "watch/down", "watch_std/down", "watch_failed/down",
    }  # fmt: skip
    assert {name for name in seen.keys() - measured.keys() if not name.startswith("reward_corr/")} == added
    assert 0 < seen["watch/change"] < 1
    assert seen["watch_failed/change"] == 0
    assert seen["watch_failed/down"] == 1
    assert seen["groups/dropped"] == 0
    assert -1 <= seen["reward_corr/change-colour"] <= 1
    assert np.isnan(seen["reward_corr/colour-down"])
    for name, value in measured.items():
        if not name.startswith("seconds/") and name != "samples_per_second":
            assert seen[name] == value


@pytest.mark.parametrize(("watch", "line"), [
    ("chagne", "watch: chagne: no such reward; did you mean change?"),
    ("colour", "watch: colour is learned from; a reward without a weight was wanted"),
    ("acd", "config: watch: acd is learned from; a reward without a weight was wanted"),
    ("change, change", "watch: change found twice"),
    (3, "watch: 3 found; text was wanted"),
    (",,", "watch: ',,' found; a name before and after each comma was wanted"),
    ("change,", "watch: 'change,' found; a name before and after each comma was wanted"),
])  # fmt: skip
def test_what_cannot_be_watched_is_refused(watch, line):
    config = small_run.make_config()
    with config.ignore_type():
        config.watch = watch
    with pytest.raises(UsageError) as refused:
        validate(config, 1)
    assert line in refused.value.problem


def test_what_is_watched_may_change_on_resume_with_its_options_and_its_plugin():
    saved = small_run.make_config(watch="lpips").to_dict()
    config = small_run.make_config(watch="change, mine")
    config.plugins = ConfigDict({"mine": "some:where"})
    config.reward_options.mine = ConfigDict({"limit": 3})
    config.reward_options.change.scale = 5.0
    now = config.to_dict()
    check_same_config(saved, now, (*MAY_DIFFER, *unlearned(now)))
    config.reward_options.colour.scale = 5.0  # which is learned from
    now = config.to_dict()
    with pytest.raises(UserError, match=r"not the checkpoint's: reward_options.colour.scale: checkpoint 40.0, "):
        check_same_config(saved, now, (*MAY_DIFFER, *unlearned(now)))


# Schedules


def test_a_schedule_is_linear_between_its_points_and_constant_outside():
    schedule = Schedule.read("10:1.0, 20:0.5,40:-1")
    assert [schedule(step) for step in (0, 10, 15, 20, 30, 40, 1000)] == [1, 1, 0.75, 0.5, -0.25, -1, -1]
    assert Schedule.read("0:2")(7) == 2


@pytest.mark.parametrize(
    "text", ["", "1", "0:1,", "0:1,0:2", "5:1,4:2", "-1:1", "0:nan", "0:1e30", "0.5:1", "a:b", "0:1:2", 3, ["0:1"]]
)
def test_what_is_no_schedule_is_refused(text):
    config = small_run.make_config()
    config.reward_schedules = ConfigDict({"colour": text})
    with pytest.raises(UsageError, match=r"reward_schedules.colour: .* found; STEP:FACTOR,STEP:FACTOR,\.\.\. with"):
        validate(config, 1)


def test_a_schedule_of_what_has_no_weight_is_refused():
    config = small_run.make_config(acd__weight=0.0)
    config.reward_schedules = ConfigDict({"acd": "0:1", "color": "0:1"})
    with pytest.raises(UsageError) as refused:
        validate(config, 1)
    assert "reward_schedules.acd: no reward with a weight; one of colour, preservation was wanted" in (
        refused.value.problem
    )
    assert "reward_schedules.color: no reward with a weight; did you mean colour?" in refused.value.problem


def scheduled() -> ConfigDict:
    config = small_run.make_config(rewards__colour=2.0, acd__weight=0.5)
    config.reward_schedules = ConfigDict({"colour": "0:1,4:0", "acd": "2:0,3:4"})
    return config


def test_the_weights_of_a_step_are_a_function_of_the_step():
    config = scheduled()
    editor, mesh = small_run.load_editor((1, 1, 1), "float32")
    validate(config, 1)
    options = read_options(Options, config)
    trainer = Trainer(options, editor, mesh, make_rewards(options))
    assert trainer.weights_after(0) == {"preservation": 1, "colour": 2, "acd": 0}
    assert trainer.weights_after(3) == {"preservation": 1, "colour": 0.5, "acd": 2}
    assert trainer.weights_after(100) == {"preservation": 1, "colour": 0, "acd": 2}


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_weights_of_one_that_did_not_stop(tmp_path):
    config = scheduled()
    train(config, tmp_path / "straight", jax.devices()[:1])
    config.train.num_steps = 2
    train(config, tmp_path / "stopped", jax.devices()[:1])
    config.train.num_steps, config.watch = 4, "change"
    train(config, tmp_path / "stopped", jax.devices()[:1])
    straight = small_run.metrics_without_times(tmp_path / "straight")
    stopped = small_run.metrics_without_times(tmp_path / "stopped")
    assert [line["reward_weight/colour"] for line in straight] == [2, 1.5, 1, 0.5]
    assert [line["reward_weight/acd"] for line in straight] == [0, 0, 0, 2]
    for one, other in zip(straight, stopped, strict=True):
        assert {name: other[name] for name in one} == one
    assert [("watch/change" in line) for line in stopped] == [False, False, True, True]


# What a step says


def test_correlations_are_those_within_groups_that_differ():
    rng = np.random.default_rng(0)
    a, noise = rng.normal(size=(2, 4, 6)).astype(np.float32)
    a += 100 * np.arange(4, dtype=np.float32)[:, None]  # between groups, which do not count
    b = noise - 100 * np.arange(4, dtype=np.float32)[:, None]
    a[2], b[3, 1] = 7.0, np.nan
    wanted = np.mean([np.corrcoef(a[p], b[p])[0, 1] for p in (0, 1)])
    found = correlation_metrics({"a": a, "b": b, "minus": -a, "flat": np.ones_like(a)})
    assert set(found) == {f"reward_corr/{x}" for x in ("a-b", "a-minus", "a-flat", "b-minus", "b-flat", "flat-minus")}
    assert found["reward_corr/a-b"] == pytest.approx(wanted, abs=1e-4)
    assert found["reward_corr/a-minus"] == pytest.approx(-1)
    assert np.isnan(found["reward_corr/a-flat"])


def test_ties_are_looked_for_once_in_each_reward(monkeypatch):
    asked, find = [], grpo.zero_std_groups
    monkeypatch.setattr(grpo, "zero_std_groups", lambda x: asked.append(1) or find(x))
    correlation_metrics({name: np.eye(4, dtype=np.float32) for name in "abcd"})
    assert len(asked) == 4


def test_groups_without_a_spread_are_counted_for_each_reward():
    a = np.float32([[1, 1, 1], [1, 2, 3], [1, np.nan, 1], [0, 0, 0]])
    found = reward_metrics({"a": a}, jnp.asarray(a + np.float32([0, 0, 1]).reshape(1, 3)))
    assert found["reward_zero_std/a"] == 0.75
    assert found["reward_zero_std/total"] == 0
    assert watch_metrics({"a": a}) == {
        "watch/a": pytest.approx(1), "watch_std/a": pytest.approx(np.sqrt(2 / 3) / 4),
        "watch_failed/a": pytest.approx(1 / 12),
    }  # fmt: skip


def test_region_and_background_are_measured_apart():
    source = np.zeros((1, 8, 8, 3), np.float32)
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, :4] = 1
    edited = np.zeros((1, 4, 8, 8, 3), np.float32)
    edited[0, :, :4] = np.float32([0.1, 0.2, 0.4, 0.8]).reshape(4, 1, 1, 1)
    edited[0, :, 4:] = 0.05
    found = drift_metrics(rewards.RewardInputs(source, edited, mask, ("",)))
    assert found == {
        "background/drift": pytest.approx(0), "background/error": pytest.approx(0.05),
        "region/drift": pytest.approx(0.3), "region/change": pytest.approx(0.375),
    }  # fmt: skip


def test_the_defaults_watch_nothing_and_have_no_schedule():
    config = default_config()
    assert (config.watch, config.reward_schedules.to_dict(), config.plugins.to_dict()) == ("", {}, {})
