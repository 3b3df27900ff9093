"""What a run leaves behind, and the numbers of its first step."""

import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from jax.profiler import ProfileData
from ml_collections import ConfigDict
from PIL import Image

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards import Reward, RewardInputs, Unscored, as_reward
from rcgrpo_jax.rl.programs import Programs
from rcgrpo_jax.rl.trainer import Trainer, train
from rcgrpo_jax.runs.metrics import read_metrics
from rcgrpo_jax.runs.state import TrainState

# The first step of `small_run.make_config()` on one CPU device.
GOLDEN = {
    "background/drift": 0.020897,
    "background/error": 0.29066,
    "candidates/missing": 0.0,
    "clip_fraction": 0.0,
    "grad_norm": 0.0038667,
    "groups/dropped": 0.0,
    "groups/zero_std": 0.0,
    "kl": 0.0,
    "policy_entropy": 1.385,
    "ratio_deviation": 0.0,
    "ratio_mean": 1.0,
    "region/change": 0.34745,
    "region/drift": 0.05216,
    "reward/acd": 1.0962,
    "reward/colour": 0.10776,
    "reward/preservation": 0.11392,
    "reward_corr/acd-colour": -0.47085,
    "reward_corr/acd-preservation": -0.6944,
    "reward_corr/colour-preservation": 0.66565,
    "reward_failed/acd": 0.0,
    "reward_failed/colour": 0.0,
    "reward_failed/preservation": 0.0,
    "reward_std/acd": 0.015256,
    "reward_std/colour": 0.0023173,
    "reward_std/preservation": 0.00048529,
    "reward_std/total": 0.40989,
    "reward_zero_std/acd": 0.0,
    "reward_zero_std/colour": 0.0,
    "reward_zero_std/preservation": 0.0,
    "reward_zero_std/total": 0.0,
}
HOW_TO_UPDATE = (
    "The first step of a run has changed. If the change is meant (another model, reward, default, random stream or "
    "order of the data), say so in CHANGELOG.md and replace GOLDEN by:\n"
)
METRICS = {
    "reward/preservation", "reward/colour", "reward/acd",  # as they came
    "reward_std/preservation", "reward_std/colour", "reward_std/acd", "reward_std/total",  # within a group
    "reward_failed/preservation", "reward_failed/colour", "reward_failed/acd",  # share of candidates
    "reward_zero_std/preservation", "reward_zero_std/colour", "reward_zero_std/acd", "reward_zero_std/total",
    "reward_corr/acd-colour", "reward_corr/acd-preservation", "reward_corr/colour-preservation",
    "background/drift", "background/error", "region/drift", "region/change",
    "ratio_mean", "ratio_deviation", "clip_fraction", "kl", "policy_entropy", "loss", "grad_norm",
    "groups/zero_std", "groups/dropped", "candidates/missing",
    "samples_per_second", "seconds/data", "seconds/rollout", "seconds/reward", "seconds/update",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[TrainState, Path]:
    """Four steps on one device, an image grid every three, two of them profiled."""
    workdir = tmp_path_factory.mktemp("run")
    config = small_run.make_config(train__image_every=3, train__profile_steps=2)
    return train(config, workdir, jax.devices()[:1]), workdir


def test_the_first_step_has_not_changed(run):
    first = small_run.metrics_without_times(run[1])[0]
    found = {name: x for name, x in first.items() if name in METRICS - {"loss"}}  # the loss is zero up to rounding
    listing = json.dumps({name: float(f"{x:.5g}") for name, x in sorted(found.items())}, indent=4)
    assert found == pytest.approx(GOLDEN, rel=1e-3), HOW_TO_UPDATE + listing
    assert abs(first["loss"]) < 1e-5


def test_every_metric_is_written_for_every_step(run):
    lines = read_metrics(run[1] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line.keys() == METRICS | {"step", "time"}
        assert all(math.isfinite(x) for x in line.values())  # null would be None
        assert line["samples_per_second"] > 0
        assert line["grad_norm"] > 0
        assert line["ratio_deviation"] == 0.0
        assert line["groups/zero_std"] == line["groups/dropped"] == 0
        assert min(x for name, x in line.items() if name.startswith("reward_std/")) > 0
        assert 0 < line["background/drift"] < line["background/error"] < 1
        assert line["background/drift"] < line["region/drift"] < line["region/change"] < 1


def test_tensorboard_has_the_same(run):
    (events,) = (run[1] / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert all(name.encode() in content for name in METRICS)
    assert b"pictures" in content
    assert b"gallery" in content


def test_grids_are_drawn_every_few_steps_and_at_the_end(run):
    files = sorted((run[1] / "images").iterdir())
    assert [file.name for file in files] == [
        f"{name}_00000{step}.png" for name in ("gallery", "step") for step in (3, 4)
    ]
    for file in files:
        picture = np.asarray(Image.open(file))
        assert picture.shape[1] > (5 if file.name.startswith("step") else 4) * 160  # source, candidates side by side
        assert picture.std() > 10


def test_a_profile_has_the_steps_that_were_asked_for(run):
    (file,) = (run[1] / "profile").rglob("*.xplane.pb")
    events = Counter(e.name for p in ProfileData.from_file(str(file)).planes for line in p.lines for e in line.events)
    assert events["train"] == 2


def test_checkpoints_are_made_and_old_ones_removed(run, tmp_path):
    state, workdir = run
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    assert int(state.step) == 4
    assert state.ema is None
    assert any(np.any(x) for x in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_two_updates_on_a_rollout_move_the_ratio(tmp_path):
    config = small_run.make_config(
        objective__updates=2, optimizer__learning_rate=1e-3, train__num_steps=1, surrogate__distance="l2",
        objective__quasi_norm=0.8, objective__kl_weight=0.1, acd__text="instruction", surrogate__steps="early",
    )  # fmt: skip
    train(config, tmp_path, jax.devices()[:1])
    (line,) = small_run.metrics_without_times(tmp_path)
    assert line["ratio_deviation"] > 0
    assert line["kl"] > 0
    assert line["loss"] < 0  # the second update sees what the first has gained


def test_scenes_train_under_the_oracle_and_a_weight_of_zero_leaves_a_reward_out(tmp_path):
    """The colour reward could not score every scene, but it is not asked; the oracle gets its targets."""
    config = small_run.make_config(data__path="scenes:train:6", train__num_steps=1)
    config.rewards = ConfigDict({"oracle": 1.0, "preservation": 0.0, "colour": 0.0})
    train(config, tmp_path, jax.devices()[:1])
    (line,) = small_run.metrics_without_times(tmp_path)
    assert {name for name in line if name.startswith("reward/")} == {"reward/oracle", "reward/acd"}
    assert 0 <= line["reward/oracle"] <= 1


MICRO_BATCHES = {"rollout__micro_batch": 4, "rollout__decode_micro_batch": 2, "surrogate__micro_batch": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (1, {}),
        pytest.param(
            1, {**MICRO_BATCHES, "objective__updates": 2, "optimizer__ema_decay": 0.9}, marks=pytest.mark.slow
        ),
        pytest.param(4, {"mesh__fsdp": 2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "micro-batches", "mesh"],
)
def test_everything_compiles_in_the_first_step(devices, changes, tmp_path, monkeypatch, caplog):
    """What follows a step counts as its own: metrics, and a checkpoint."""
    take_step, started = Trainer.step, "a step starts"

    def step(self, *args):
        logging.getLogger(__name__).warning(started)
        return take_step(self, *args)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr("rcgrpo_jax.rl.programs.shared_programs", Programs)  # another test's would be compiled already
    config = small_run.make_config(train__save_every=1, train__image_every=4, **changes)
    caplog.set_level(logging.WARNING, "jax")  # the program's own commands want errors alone
    with jax.log_compiles():
        train(config, tmp_path, jax.devices()[:devices])
    compiled = []  # of each step
    for message in caplog.messages:
        if message == started:
            compiled.append([])
        elif compiled and message.startswith("Compiling "):
            compiled[-1].append(message.split(" with ")[0])
    assert compiled[0].count("Compiling jit(_update)") == 1
    assert compiled[1:3] == [[], []]


class Judge(Reward):
    """A toy of a server that answers, from a thread, once it has been asked about every part."""

    def __init__(self, parts: int, fails: Callable[[np.ndarray], None] = lambda scores: None):
        self.parts, self.fails, self.order, self.all_asked = parts, fails, [], threading.Event()
        self.pool = ThreadPoolExecutor(parts)

    def start(self, inputs: RewardInputs) -> Future:
        self.order.append("start" if inputs.edited.is_ready() else "too early")
        if self.order.count("start") == self.parts:
            self.all_asked.set()
        return self.pool.submit(self.answer, inputs.edited.shape[:2])

    def answer(self, shape: tuple[int, int]) -> np.ndarray:
        assert self.all_asked.wait(120), "an answer is waited for before all parts have been started"
        scores = np.random.default_rng(0).random(shape, np.float32)
        self.fails(scores)
        self.order.append("answer")
        return scores


def test_a_server_is_asked_about_each_part_as_it_comes_and_waited_for_in_the_end(monkeypatch):
    """The devices have work while a reward takes its time, and the servers have all parts at once."""
    trainer, judge = small_run.make_trainer(rollout__micro_batch=4), Judge(parts=2)
    programs = trainer.programs
    for owner, name in ((trainer, "reward_inputs"), (programs, "rollout"), (programs, "decode")):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, call=call, name=name: judge.order.append(name) or call(*args))
    monkeypatch.setattr(trainer, "rewards", trainer.rewards | {"judge": judge})
    with jax.set_mesh(programs.mesh):
        sample = trainer.sample(small_run.make_state(trainer), trainer.prepare(small_run.make_batch(trainer)))
    assert judge.order == ["reward_inputs", *["rollout", "decode"] * 2, *["start"] * 2, *["answer"] * 2]
    assert sample.scores["judge"].shape == (2, 4)


def no_answer(scores: np.ndarray) -> None:
    raise Unscored("503 Service Unavailable")


def one_lost(scores: np.ndarray) -> None:
    scores[0, 1] = np.nan


def most_lost(scores: np.ndarray) -> None:
    scores[0, 1:] = np.nan


@pytest.mark.parametrize(
    ("fails", "share", "dropped", "missing", "warnings"),
    [
        (one_lost, 1 / 8, 0, 1, []),
        (most_lost, 3 / 8, 1, 0, []),
        (no_answer, 1, 2, 0, ["step 1: reward 'judge': 503 Service Unavailable"]),
    ],
)
def test_a_step_goes_on_without_what_a_server_has_not_scored(
    monkeypatch, caplog, fails, share, dropped, missing, warnings
):
    trainer = small_run.make_trainer()
    judge = Judge(1, fails)
    monkeypatch.setattr(trainer, "rewards", trainer.rewards | {"judge": judge})
    monkeypatch.setattr(trainer, "weights", trainer.weights | {"judge": 1.0})
    monkeypatch.setattr(trainer, "unscored", 0)
    _, metrics, _ = small_run.take_step(trainer, small_run.make_state(trainer), small_run.make_batch(trainer))
    assert metrics["reward_failed/judge"] == share
    assert metrics["reward_failed/colour"] == 0
    assert (metrics["groups/dropped"], metrics["candidates/missing"]) == (dropped, missing)
    assert caplog.messages == warnings


def test_the_devices_finish_the_next_part_while_a_reward_takes_its_time(monkeypatch):
    """The reward of the first part returns only once the pictures of the second are there."""
    trainer, pictures = small_run.make_trainer(rollout__micro_batch=4), []
    decode, colour = trainer.programs.decode, trainer.rewards["colour"]

    def decoded(*args):
        pictures.append(decode(*args))
        return pictures[-1]

    def slow(inputs):
        deadline = time.monotonic() + 120
        while not pictures[1].is_ready():
            assert time.monotonic() < deadline, "nothing runs beside the reward"
            time.sleep(0.001)
        return colour(inputs)

    monkeypatch.setattr(trainer.programs, "decode", decoded)
    monkeypatch.setattr(trainer, "rewards", {"colour": as_reward(slow)})
    with jax.set_mesh(trainer.programs.mesh):
        sample = trainer.sample(small_run.make_state(trainer), trainer.prepare(small_run.make_batch(trainer)))
    assert len(pictures) == 2
    assert all(np.isfinite(scores).all() for scores in sample.scores.values())


def test_the_next_batch_is_on_its_way_before_the_update_is_waited_for(monkeypatch):
    trainer, order = small_run.make_trainer(), []
    update, prepare = trainer.programs.update, trainer.prepare
    state, batch = small_run.make_state(trainer), small_run.make_batch(trainer)

    class Watched(NamedTuple):
        value: jax.Array

        def __float__(self):
            order.append("wait")
            return float(self.value)

    def watched_update(*args):
        order.append("update")
        state, log_pi, metrics = update(*args)
        return state, log_pi, {name: Watched(x) for name, x in metrics.items()}

    with jax.set_mesh(trainer.programs.mesh):
        prepared_batch, upcoming = prepare(batch), small_run.make_batch(trainer, step=1)
        monkeypatch.setattr(trainer.programs, "update", watched_update)
        monkeypatch.setattr(trainer, "prepare", lambda batch: order.append("prepare") or prepare(batch))
        *_, following = trainer.step(state, prepared_batch, upcoming)
    assert order[:3] == ["update", "prepare", "wait"]
    assert following.batch is upcoming
    np.testing.assert_array_equal(following.prompts.condition.text, upcoming.encoded["text"])


def test_the_update_writes_the_state_where_the_old_one_was():
    trainer = small_run.make_trainer()
    programs, state = trainer.programs, small_run.make_state(trainer)
    with jax.set_mesh(programs.mesh):
        sample = trainer.sample(state, trainer.prepare(small_run.make_batch(trainer)))
        log_old = jnp.zeros(programs.policy.kept_shape())
        shapes = (jnp.zeros(sample.scores["acd"].shape), log_old, jnp.asarray(True))
        update = programs.update.lower(trainer.params, state, *sample[:3], *shapes).compile()
    assert update.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("data", "problem"),
    [({}, "no target image; the reward 'oracle' needs one"),
     ({"data__path": "scenes:train:6:1"}, "flawed on purpose; the reward 'oracle' needs a right one")],
)  # fmt: skip
def test_a_reward_that_needs_a_target_is_refused_without_a_right_one(data, problem, tmp_path):
    config = small_run.make_config(**data)
    config.rewards = ConfigDict({"oracle": 1.0})
    with pytest.raises(UserError, match=problem):
        train(config, tmp_path, jax.devices()[:1])


def test_runs_share_programs_where_they_differ_in_nothing_that_these_read():
    programs = small_run.make_trainer().programs
    assert small_run.make_trainer(seed=5, train__num_steps=9, data__path="elsewhere").programs is programs
    for changes in ({"objective__clip": 0.5}, {"lora__alpha": 3.0}, {"model__guidance": 3.5}, {"data__size": (64, 80)}):
        assert small_run.make_trainer(**changes).programs is not programs
