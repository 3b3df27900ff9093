"""The scripts of examples/ are short, say how to run them, and do what they say."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from PIL import Image
from safetensors.numpy import load_file

from rcgrpo_jax import rewards
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.rewards import RewardInputs
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.runs.metrics import read_metrics

EXAMPLES = small_run.ROOT / "examples"


def run(name: str, workdir: Path) -> str:
    """Runs an example as its docstring says, on one device; what it printed."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": str(small_run.ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, str(EXAMPLES / name), str(workdir)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_an_example_is_short_and_says_how_to_run_it_and_how_long_it_takes(file):
    text = file.read_text()
    about = ast.get_docstring(ast.parse(text))
    assert text.count("\n") < 60
    assert f"python examples/{file.name} runs/" in about
    assert re.search(r"take[ns]?\b.*(second|minute)", about)
    assert f'run("{file.name}"' in Path(__file__).read_text()  # a test runs it


# A reward of one's own


@pytest.fixture
def example(monkeypatch) -> dict:
    """The names of own_reward.py, whose reward is registered for one test."""
    monkeypatch.setattr(rewards.base, "_FACTORIES", dict(rewards.base._FACTORIES))
    return runpy.run_path(str(EXAMPLES / "own_reward.py"))


def test_brightness_is_the_mean_inside_the_mask_up_to_the_limit(example):
    edited = np.full((1, 2, 4, 4, 3), 0.95, np.float32)
    edited[0, 0, :2] = 0.25
    mask = np.zeros((1, 4, 4), np.float32)
    mask[0, :2] = 1
    inputs = RewardInputs(jnp.zeros((1, 4, 4, 3)), jnp.asarray(edited), jnp.asarray(mask), ("Paint it white.",))
    np.testing.assert_allclose(example["Brightness"]()(inputs), [[0.25, 0.9]], rtol=1e-6)
    mask[:] = 0
    assert np.isnan(example["Brightness"]()(inputs._replace(mask=jnp.asarray(mask)))).all()


def test_the_configuration_with_the_reward_is_valid(example):
    config = example["get_config"]()
    validate(config, 1)
    config.reward_options.brightness.limt = 0.5
    with pytest.raises(UsageError, match=r"reward_options.brightness.limt: no such option; did you mean limit\?"):
        validate(config, 1)


@pytest.mark.slow
def test_own_reward_trains_on_the_reward(tmp_path):
    printed = run("own_reward.py", tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert printed.splitlines() == [f"step {x['step']}: brightness {x['reward/brightness']:.3f}" for x in lines]
    assert [x["step"] for x in lines] == [1, 2, 3]
    assert all(0 < x["reward/brightness"] <= 0.8 for x in lines)
    assert "reward/oracle" not in lines[0]


# Training from Python, and reading the run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """The directory of train_in_python.py, and what it printed."""
    workdir = tmp_path_factory.mktemp("python")
    return workdir, run("train_in_python.py", workdir)


@pytest.mark.slow
def test_train_in_python_leaves_a_lora_and_two_edits_that_differ(trained):
    workdir, printed = trained
    assert printed.startswith("trained 3 steps\n")
    picture = Image.open(workdir / "edits.png")
    assert picture.size == (3 * 128, 128)
    _, without, with_lora = np.split(np.asarray(picture), 3, axis=1)
    assert (without != with_lora).any()


@pytest.mark.slow
def test_read_run_reads_it_and_writes_the_lora_that_export_wrote(trained):
    workdir, _ = trained
    file = workdir / "lora" / "pytorch_lora_weights.safetensors"
    exported = load_file(file)
    file.unlink()
    printed = run("read_run.py", workdir)
    assert [line.split(":")[0] for line in printed.splitlines()[:3]] == ["step 1", "step 2", "step 3"]
    assert "checkpoints of steps [3]; the last has seen 3" in printed
    written = load_file(file)
    assert written.keys() == exported.keys()
    assert all((written[name] == exported[name]).all() for name in exported)
