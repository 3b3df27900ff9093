"""`rcgrpo export`: every form, every checkpoint, and runs of either kind of training."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.sft import config as sft_config
from rcgrpo_jax.weights.lora import FORMS, LORA_FILE, load_lora

STEPS = (2, 4)


def save_run(path: Path, config: dict) -> Path:
    """Checkpoints 2 and 4 of a run."""
    trainer = small_run.make_trainer()
    with Checkpointer(path / "checkpoints", save_every=2, keep=2) as checkpointer:
        for step in STEPS:
            state = small_run.make_state(trainer, seed=step).replace(step=jnp.int32(step))
            checkpointer.save(step, state, config)
    return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"), small_run.make_config().to_dict() | {"model_digest": "0"})


def assert_is_checkpoint(file: Path, step: int) -> None:
    trainer = small_run.make_trainer()
    adapter, config = load_lora(file, trainer.params)
    assert (config.rank, config.alpha) == (4, 8.0)
    wanted = flatten_dict(small_run.make_state(trainer, seed=step).params)
    assert flatten_dict(adapter).keys() == wanted.keys()
    for path, x in flatten_dict(adapter).items():
        np.testing.assert_allclose(x, wanted[path], rtol=2**-8)


@pytest.mark.parametrize("form", FORMS)
def test_export_writes_every_form(capsys, tmp_path, workdir, form):
    code, out, err = small_run.run_command(
        capsys, "export", f"--workdir={workdir}", f"--out={tmp_path}", f"--format={form}"
    )
    assert (code, err, out) == (0, "", f"LoRA: {tmp_path / FORMS[form]}\n")
    assert_is_checkpoint(tmp_path / FORMS[form], 4)


def test_export_writes_every_checkpoint(capsys, tmp_path, workdir):
    code, out, err = small_run.run_command(capsys, "export", f"--workdir={workdir}", f"--out={tmp_path}", "--all")
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines()] == [f"LoRA of step {step}" for step in STEPS]
    for step in STEPS:
        assert_is_checkpoint(tmp_path / f"step_{step:06d}" / LORA_FILE, step)


def test_export_writes_a_file_of_the_given_name_and_dtype(capsys, tmp_path, workdir):
    file = tmp_path / "mug.safetensors"
    argv = (f"--workdir={workdir}", f"--out={file}", "--dtype=float32")
    assert small_run.run_command(capsys, "export", *argv)[0] == 0
    with safe_open(file, framework="np") as handle:
        assert {handle.get_slice(key).get_dtype() for key in handle.keys()} == {"F32"}  # noqa: SIM118
    assert_is_checkpoint(file, 4)


def supervised(stage: str) -> dict:
    config, ours = sft_config.default_config(), small_run.make_config()
    config.stage, config.model, config.data, config.lora = stage, ours.model, ours.data, ours.lora
    config.optimizer = ours.optimizer
    return config.to_dict()


def test_a_supervised_run_is_exported_too(capsys, tmp_path):
    workdir = save_run(tmp_path / "run", supervised("lora"))
    code, _, err = small_run.run_command(capsys, "export", f"--workdir={workdir}", f"--out={tmp_path / 'lora'}")
    assert (code, err) == (0, "")
    assert_is_checkpoint(tmp_path / "lora", 4)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--all", "--step=2"], "--all: together with --step"),
        (["--all", "--out=a.safetensors"], "--all: together with --step, or with a file for --out"),
        (["--all", "--workdir=nothing"], "--workdir: nothing has no checkpoint"),
        (["--format=gguf"], "gguf"),
        (["--workdir={flow}"], "is a run of stage flow, which trains no LoRA"),
    ],
)
def test_export_refuses(capsys, tmp_path, monkeypatch, workdir, argv, problem):
    monkeypatch.chdir(tmp_path)
    flow = save_run(tmp_path / "flow", supervised("flow")) if "{flow}" in argv[-1] else ""
    given = {"--workdir": str(workdir), "--out": "lora"}
    given |= dict(arg.format(flow=flow).partition("=")[::2] for arg in argv if "=" in arg)
    flags = [f"{name}={value}" for name, value in given.items()] + [arg for arg in argv if "=" not in arg]
    _, found, _ = small_run.fail(capsys, "export", *flags)
    assert problem in found
    assert not Path("lora").exists()


def test_export_keeps_a_file_that_is_no_lora(capsys, tmp_path, workdir):
    base = tmp_path / "base.safetensors"
    save_file({"x_embedder.weight": np.ones((2, 2), np.float32)}, base)
    before = base.read_bytes()
    _, problem, _ = small_run.fail(capsys, "export", f"--workdir={workdir}", f"--out={base}")
    assert "base.safetensors is there and holds no LoRA" in problem
    assert base.read_bytes() == before


def test_export_leaves_nothing_where_it_cannot_write(capsys, tmp_path, workdir):
    (tmp_path / "a.safetensors").mkdir()
    _, problem, _ = small_run.fail(capsys, "export", f"--workdir={workdir}", f"--out={tmp_path / 'a.safetensors'}")
    assert "cannot be written" in problem
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_factors_of_the_checkpoints_differ():
    trainer = small_run.make_trainer()
    first, last = (small_run.make_state(trainer, seed=step).params for step in STEPS)
    assert trainer.options.lora.scale == 2.0
    assert any(not np.allclose(x, y) for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True))
