"""Runs with a judge: what servers do to a run, what a run says of its judge, and how it goes on after one was gone."""

import json
import math
import os
import shutil
import signal
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_run
from flax import struct
from judge_server import JudgeServer, Reply, batch, be_quick, digest, make_judge, rate, serving
from ml_collections import ConfigDict
from test_resume import assert_bit_equal

from rcgrpo_jax.errors import StopRequested, UserError, mark_everywhere
from rcgrpo_jax.options import TrainOptions, read_options
from rcgrpo_jax.rewards import Reward, VLMDigits, start_all
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.setup import Setup
from rcgrpo_jax.rl.trainer import post_train, train
from rcgrpo_jax.runs import run as runs_run
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.metrics import read_metrics
from rcgrpo_jax.runs.run import run_steps


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    be_quick(monkeypatch)


def digits(body: dict, attempt: int = 1) -> Reply:
    """Probabilities of digits that depend on the whole request, and on nothing else."""
    tokens = [
        {"token": str(digit), "logprob": math.log((1 + digest({"of": body, "digit": digit}, 100)) / 600)}
        for digit in range(6)
    ]
    return Reply(json.dumps({"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}).encode())


def take_step(monkeypatch, judge, trainer, state, batch):
    """A step of a trainer with a judge beside its rewards: parameters, and metrics without times."""
    monkeypatch.setattr(trainer, "rewards", trainer.rewards | {"judge": judge})
    monkeypatch.setattr(trainer, "weights", trainer.weights | {"judge": 1.0})
    state, metrics, _ = small_run.take_step(trainer, state, batch)
    params = [np.asarray(x).tobytes() for x in jax.tree.leaves(state.params)]
    return params, metrics


def test_a_step_is_the_same_bit_for_bit_if_servers_fail_at_a_fifth_of_the_requests(monkeypatch):
    def failing(body: dict, attempt: int) -> Reply:
        return Reply(status=500) if digest({"of": body, "attempt": attempt}, 5) == 0 else rate(body)

    trainer = small_run.make_trainer()
    state, batch = small_run.make_state(trainer), small_run.make_batch(trainer)
    with serving() as whole, serving(failing) as server:
        wanted, before = take_step(monkeypatch, make_judge(whole, num_pass=4), trainer, state, batch)
        found, after = take_step(monkeypatch, make_judge(server, num_pass=4, attempts=20), trainer, state, batch)
    assert after["judge/judge/retries"] > before["judge/judge/retries"] == 0
    assert before["reward_std/judge"] > 0
    assert found == wanted
    for name, x in before.items():
        if not name.startswith(("judge/", "seconds/", "samples_per_second")):
            np.testing.assert_array_equal(after[name], x)


def test_a_step_with_candidates_that_are_never_answered_counts_them(monkeypatch):
    lost: dict[str, bool] = {}

    def failing(body: dict, attempt: int) -> Reply:
        edited = body["messages"][0]["content"][-2]["image_url"]["url"]
        return Reply(status=500) if lost.setdefault(edited, not lost) else rate(body)  # the first that comes

    trainer = small_run.make_trainer()
    monkeypatch.setattr(trainer, "unscored", 0)
    with serving(failing) as server:
        judge = make_judge(server, attempts=2)
        _, metrics = take_step(
            monkeypatch, judge, trainer, small_run.make_state(trainer), small_run.make_batch(trainer)
        )
    assert metrics["reward_failed/judge"] == 1 / 8
    assert metrics["judge/judge/unscored"] == 1
    assert (metrics["groups/dropped"], metrics["candidates/missing"]) == (0, 1)
    assert math.isfinite(metrics["loss"])


# Whole runs


def judged(server: JudgeServer, **options) -> ConfigDict:
    config = small_run.make_config(train__save_every=100)
    config.rewards = ConfigDict({"vlm_digits": 1.0})
    config.reward_options.vlm_digits = ConfigDict({"urls": server.url, "model": "tiny", **options})
    return config


def run(config: ConfigDict, workdir: Path):
    return train(config, workdir, jax.devices()[:1])


def test_a_judge_that_is_not_there_is_told_before_any_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Setup, "load_editor", None)
    monkeypatch.setattr(Setup, "encode", None)
    with serving() as server:
        config = judged(server)
    with pytest.raises(UserError, match=r"reward 'vlm_digits': http://.* no connection"):
        run(config, tmp_path)


@pytest.mark.usefixtures("one_device")
def test_a_run_that_is_refused_late_leaves_no_directory(capsys, tmp_path):
    with serving() as server:
        file = small_run.config_file(tmp_path / "config.py", config=judged(server))
    _, problem, _ = small_run.fail(capsys, "train", f"--config={file}", f"--workdir={tmp_path / 'runs' / 'a'}")
    assert "no connection" in problem
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]


@dataclass
class Asked(Reward):
    """Its scores are a future that the test has."""

    future: Future

    def start(self, inputs):
        return self.future


def test_a_requested_stop_ends_the_wait_for_scores_and_loses_none_that_are_there():
    stop, inputs, never, there = threading.Event(), batch(1, 2), Future(), Future()
    there.set_result(np.ones((1, 2)))
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(StopRequested, match="reward 'mine': a stop was requested before it had scored"):
        start_all({"mine": Asked(never)}, inputs).result(stop)
    assert never.cancelled()
    np.testing.assert_array_equal(start_all({"mine": Asked(there)}, inputs).result(stop).by_reward["mine"], [[1, 1]])


class Counted(struct.PyTreeNode):
    step: jax.Array


def test_a_step_that_ends_the_run_costs_no_step_before_it(tmp_path):
    """As a judge that is gone ends it, before the update takes the state."""

    def step(state: Counted, index: int, draw: bool):
        if index == 2:
            raise mark_everywhere(UserError("the judge is gone.", "Start it."))
        return Counted(state.step + 1), {}, None

    options = TrainOptions(num_steps=5, save_every=100)
    with (
        Checkpointer(tmp_path / "checkpoints", save_every=100, keep=1) as checkpointer,
        pytest.raises(UserError, match="the judge is gone"),
    ):
        run_steps(Counted(jax.numpy.int32(0)), step, options, {}, tmp_path, checkpointer, "train", 1, dict)
    again = Checkpointer(tmp_path / "checkpoints", save_every=100, keep=1)
    assert int(again.restore(Counted(jax.numpy.int32(0))).step) == 2


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_step_that_is_given_up_for_a_stop_ends_the_run_after_the_step_before(
    tmp_path, monkeypatch, caplog, elsewhere
):
    """Also in a process that was not asked to stop itself: it hears of another's error."""
    monkeypatch.setattr(runs_run, "any_process", lambda flag: flag or (elsewhere and len(steps) == 3))
    steps = []

    def step(state: Counted, index: int, draw: bool):
        steps.append(index)
        if index == 2:
            raise mark_everywhere((UserError if elsewhere else StopRequested)("given up.", "Go on."))
        return Counted(state.step + 1), {}, None

    options = TrainOptions(num_steps=5, save_every=100)
    with Checkpointer(tmp_path / "checkpoints", save_every=100, keep=1) as checkpointer:
        given = (options, {}, tmp_path, checkpointer, "train", 1, dict)
        assert int(run_steps(Counted(jax.numpy.int32(0)), step, *given).step) == 2
        assert checkpointer.latest_step() == 2
    assert "stopped at step 2 on request" in caplog.text


@pytest.mark.slow
def test_a_run_that_is_stopped_while_its_judge_is_gone_saves_and_goes_on(tmp_path):
    def dying(body: dict, attempt: int) -> Reply:
        if len(server.bodies) == 1 + 2 * 8 + 3:  # in the third step
            server.die()
            os.kill(os.getpid(), signal.SIGTERM)
        return digits(body)

    with serving(digits) as whole, serving(dying) as server:
        wanted = run(judged(whole), tmp_path / "whole")
        stopped = post_train(judged(server, patience=3600.0), tmp_path / "parts", jax.devices()[:1])
        assert (int(stopped.state.step), stopped.finished) == (2, False)
        assert_bit_equal(run(judged(whole), tmp_path / "parts"), wanted)


@pytest.mark.slow
def test_a_run_whose_judge_dies_saves_and_goes_on_with_another(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "sk-12345")
    options = {"patience": 0.3, "token_variable": "JUDGE_TOKEN"}

    def dying(body: dict, attempt: int) -> Reply:
        if len(server.bodies) == 1 + 2 * 8 + 3:  # in the third step
            server.die()
        return digits(body)

    with serving(digits) as whole:
        wanted = run(judged(whole, **options), tmp_path / "whole")
    with (
        serving(dying) as server,
        pytest.raises(UserError, match=r"reward 'vlm_digits': no server has answered for 0\.3 s"),
    ):
        run(judged(server, **options), tmp_path / "parts")
    assert [entry["step"] for entry in read_metrics(tmp_path / "parts" / "metrics.jsonl")] == [1, 2]
    with serving(digits) as other:
        assert_bit_equal(run(judged(other, **options), tmp_path / "parts"), wanted)
        assert len(other.bodies) == 1 + 2 * 8
    lines = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert [line["judge/vlm_digits/answers"] for line in lines] == [8] * 4
    assert all(0 < line["judge/vlm_digits/seconds_p50"] <= line["judge/vlm_digits/seconds_max"] for line in lines)
    files = [path.read_bytes() for path in (tmp_path / "parts").rglob("*") if path.is_file()]
    assert not any(b"sk-12345" in content for content in files)


@pytest.mark.slow
def test_a_run_goes_on_under_the_same_judge_alone(tmp_path):
    (tmp_path / "one.txt").write_text("How good is {edited}?")
    (tmp_path / "other.txt").write_text("How bad is {edited}?")
    with serving(digits) as server:
        config = judged(server, template=str(tmp_path / "one.txt"))
        config.train.num_steps = 1
        run(config, tmp_path / "run")
        config.train.num_steps = 2
        changed = config.copy_and_resolve_references()
        changed.reward_options.vlm_digits.template = str(tmp_path / "other.txt")
        with pytest.raises(UserError, match=r"judges\.vlm_digits\.prompts: checkpoint \"[0-9a-f]{64}\", config \""):
            run(changed, tmp_path / "run")
        shutil.move(tmp_path / "one.txt", tmp_path / "moved.txt")
        config.reward_options.vlm_digits.template = str(tmp_path / "moved.txt")
        assert int(run(config, tmp_path / "run").step) == 2


def test_a_run_records_its_judge():
    with serving() as server:
        config = judged(server)
        judge = VLMDigits(**config.reward_options.vlm_digits)
    model, rewards = SimpleNamespace(trained_fingerprint=lambda: "f"), {"vlm_digits": judge}
    learned, watched = (read_options(Options, small_run.make_config(**x)) for x in ({"rewards__vlm_digits": 1.0}, {}))
    described = {"vlm_digits": judge.describe()}
    assert Setup(learned, None, model, rewards).record() == {"model_digest": "f", "judges": described}
    assert Setup(watched, None, model, rewards).record() == {"model_digest": "f"}  # it may differ at the next start
