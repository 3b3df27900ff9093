"""Whole runs of DiffusionNFT: they go on bit for bit, on several processes too, and other commands read them."""

import shutil
import signal
import subprocess
from pathlib import Path

import jax
import pytest
import small_run
from test_distributed import assert_same_adapter, finish, start
from test_nft import UNREAD
from test_plan import total_bytes, workload
from test_resume import assert_bit_equal

from rcgrpo_jax.rl.trainer import train
from rcgrpo_jax.runs.state import TrainState

SETTINGS = UNREAD | {
    "policy": "nft", "nft__keep_weight": 0.5, "nft__decay": "ramp", "rollout__num_steps": 2, "nft__time_fraction": 0.5,
    "optimizer__ema_decay": 0.9, "optimizer__learning_rate": 1e-3,
}  # fmt: skip
WHOLE = SETTINGS | {"rollout__prompts": 4, "mesh__fsdp": 2, "objective__updates": 2, "train__num_steps": 3}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[TrainState, Path]:
    """Four steps in one go."""
    workdir = tmp_path_factory.mktemp("straight")
    return train(small_run.make_config(**SETTINGS), workdir), workdir


def test_a_killed_run_goes_on_bit_for_bit(straight, tmp_path):
    workdir = tmp_path / "run"
    body = small_run.signal_after(3, "SIGKILL", workdir / "checkpoints" / "2")
    file = small_run.config_file(tmp_path / "config.py", body, **SETTINGS)
    command = small_run.command("train", f"--config={file}", f"--workdir={workdir}")
    killed = subprocess.run(command, env=small_run.environment(), capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state, wanted = train(small_run.make_config(**SETTINGS), workdir), straight[0]
    assert_bit_equal(state, wanted)
    assert state.num_updates == 4
    leaves = [jax.tree.leaves(tree) for tree in (state.params, state.old, state.ema)]
    assert all((x != y).any() for i, j in ((0, 1), (1, 2)) for x, y in zip(leaves[i], leaves[j], strict=True))
    assert small_run.metrics_without_times(workdir) == small_run.metrics_without_times(straight[1])


def test_the_metrics_say_how_far_the_adapter_has_gone(straight):
    lines = small_run.metrics_without_times(straight[1])
    for name in ("from_old", "from_base"):
        assert lines[0][name] < 1e-12  # the first step begins at the old adapter, which is the base
        assert lines[-1][name] > 1e-11  # the old one follows closely: d is 0.003
    assert lines[0]["region_penalty"] > 0


def test_two_processes_are_one_run(tmp_path):
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    train(small_run.make_config(**WHOLE), alone)
    config = small_run.config_file(tmp_path / "config.py", **WHOLE)
    ended = finish(start(config, workdir, 2), tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    found, wanted = (small_run.metrics_without_times(path) for path in (workdir, alone))
    for line, expected in zip(found, wanted, strict=True):
        assert line == pytest.approx(expected, rel=2e-3, abs=2e-6)
    assert_same_adapter(workdir, alone, tmp_path)


def test_it_is_reported_exported_and_evaluated(straight, tmp_path, capsys):
    workdir = Path(shutil.copytree(straight[1], tmp_path / "run"))
    code, _, problem = small_run.run_command(capsys, "export", f"--workdir={workdir}", f"--out={tmp_path / 'lora'}")
    assert code == 0, problem
    code, _, problem = small_run.run_command(
        capsys, "evaluate", f"--model={small_run.model_folder()}", f"--lora={tmp_path / 'lora'}",
        f"--data={small_run.data_folder()}", "--size=64x64", "--steps=2", "--text_tokens=16", "--dtype=float32",
        f"--out={tmp_path / 'evaluation'}", "--acd_layers=2",
    )  # fmt: skip
    assert code == 0, problem
    page = tmp_path / "page.html"
    code, _, problem = small_run.run_command(capsys, "report", f"--workdir={workdir}", f"--out={page}")
    assert code == 0, problem
    text = page.read_text()
    assert "DiffusionNFT post-training" in text
    assert "beta 1.0, 0.5 of the times, decay ramp" in text
    assert "Distances of velocities" in text
    assert "Surrogate" not in text


def test_the_plan_counts_what_is_compiled():
    """The old adapter once in every program, and the evaluations of all three adapters in the update."""
    planned = workload(**SETTINGS)
    state = planned.trees["state"]
    assert total_bytes(state.old) == total_bytes(state.params) > 0
    kept = [planned.held(name) + total_bytes(planned.arguments(name)) for name in ("rollout", "update")]
    assert min(kept) > total_bytes(state)
    plan = planned.compile("update")
    assert 0.85 < plan.cost.flops / plan.analytic < 1.05
