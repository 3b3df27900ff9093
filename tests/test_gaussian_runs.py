"""Whole runs of the policy `gaussian`, whose window moves: resumed, in parts, on other meshes, in processes."""

import signal
import subprocess

import jax
import numpy as np
import pytest
import small_run
from test_distributed import ROUNDING, WHOLE, finish, start
from test_resume import assert_bit_equal

from rcgrpo_jax.method import grpo
from rcgrpo_jax.rl.trainer import train

# The window is at the first steps in training steps 1 to 3, and then moves by one.
SETTINGS = {
    "policy": "gaussian", "rollout__num_steps": 5, "sde__window": 2, "sde__interval": 3, "sde__noise": "region",
    "objective__advantage_std": "batch", "objective__updates": 2, "objective__kl_weight": 0.01,
    "optimizer__learning_rate": 1e-3, "surrogate__anchors": 4, "surrogate__distance": "l2", "surrogate__steps": "early",
}  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_within_a_window_and_across_its_move(tmp_path, monkeypatch):
    of_group, divided_by = grpo.group_advantages, set()

    def advantages(*args):
        divided_by.add(args[-1])
        return of_group(*args)

    monkeypatch.setattr(grpo, "group_advantages", advantages)
    wanted = train(small_run.make_config(**SETTINGS), tmp_path / "straight")
    assert divided_by == {"batch"}
    metrics = small_run.metrics_without_times(tmp_path / "straight")
    assert [line["random_step"] for line in metrics] == [1.5, 1.5, 1.5, 2.5]
    assert all(line["kl"] > 0 and np.isfinite(line["loss"]) for line in metrics)

    workdir = tmp_path / "run"
    body = small_run.signal_after(3, "SIGKILL", workdir / "checkpoints" / "2")
    file = small_run.config_file(tmp_path / "config.py", body, **SETTINGS)
    command = small_run.command("train", f"--config={file}", f"--workdir={workdir}")
    killed = subprocess.run(command, env=small_run.environment(), capture_output=True, text=True, timeout=900)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert_bit_equal(train(small_run.make_config(**SETTINGS), workdir), wanted)
    assert small_run.metrics_without_times(workdir) == metrics


@pytest.mark.slow
def test_one_device_and_micro_batches_are_the_run_on_eight(tmp_path):
    settings = SETTINGS | {"optimizer__learning_rate": 1e-2}
    parts = {"rollout__micro_batch": 4, "surrogate__micro_batch": 4}
    train(small_run.make_config(**settings), tmp_path / "eight")
    train(small_run.make_config(**settings, **parts), tmp_path / "one", jax.devices()[:1])
    assert_same_metrics(tmp_path / "one", tmp_path / "eight")


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    settings = SETTINGS | WHOLE | {"optimizer__learning_rate": 1e-2}
    train(small_run.make_config(**settings), tmp_path / "alone")
    workdir = tmp_path / "run"
    file = small_run.config_file(tmp_path / "config.py", **settings, rollout__micro_batch=8)
    ended = finish(start(file, workdir, 2), tmp_path, 900)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same_metrics(workdir, tmp_path / "alone")


def assert_same_metrics(found, wanted):
    """The losses are differences of nearly equal numbers; gradients and KL are not."""
    for line, expected in zip(*map(small_run.metrics_without_times, (found, wanted)), strict=True):
        assert min(expected["grad_norm"], expected["kl"]) > 10 * ROUNDING
        assert line == pytest.approx(expected, rel=5e-3, abs=ROUNDING)
