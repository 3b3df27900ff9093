"""The command line: what it makes, and two lines with a way out whatever a user gets wrong."""

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from flax.traverse_util import flatten_dict
from PIL import Image

from rcgrpo_jax.cli import main as entry
from rcgrpo_jax.cli.config_file import keep_compilations
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.lora import load_lora

# The program itself


def test_no_arguments_show_the_usage(capsys):
    code, out, _ = small_run.run_command(capsys)
    assert code == 2
    assert out.startswith("usage: rcgrpo COMMAND")
    assert all(f"\n  {command} " in out for command in entry.COMMANDS)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"], *([command, "--help"] for command in entry.COMMANDS)])
def test_help_is_no_error(capsys, argv):
    code, out, err = small_run.run_command(capsys, *argv)
    assert (code, err) == (0, "")
    assert out.startswith("usage: rcgrpo ")


def test_help_says_what_must_be_given_and_of_each_flag_what_it_takes_and_its_default(capsys):
    _, out, _ = small_run.run_command(capsys, "data", "prepare", "--help")
    assert out.startswith("usage: rcgrpo data prepare NAME --from=VALUE --out=VALUE [--FLAG=VALUE ...]\n")
    shown = {name: " ".join(small_run.run_command(capsys, name, "--help")[1].split()) for name in ("edit", "judge")}
    assert "--steps: solver steps (a positive integer; default: 28)" in shown["edit"]
    assert "--dtype: <bfloat16|float32>: compute dtype (default: bfloat16)" in shown["edit"]
    assert "--[no]sources: score the examples' sources: the edit that does nothing (default: false)" in shown["judge"]
    assert "--option: NAME=VALUE of the reward; may be given again --" in shown["judge"]  # absl's own words are gone
    assert not [text for text in (out, *shown.values()) if "absl" in text or "rcgrpo_jax.cli" in text]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["edti"], "unknown command 'edti'. Did you mean 'edit'?"),
        (["--verbose"], "unknown command '--verbose'."),
        (["edit", "--imgae=a.png"], "unknown flag --imgae. Did you mean --image?"),
        (["train", "--workdri=a"], "unknown flag --workdri. Did you mean --workdir?"),
        (["export", "--zzz"], "unknown flag --zzz."),
        (["edit", "--steps=0"], "flag --steps=0: 0 is not a positive integer."),
        (["edit", "--steps=few"], "flag --steps=few: invalid literal for int() with base 10: 'few'."),
        (["edit", "--dtype=float16"], "flag --dtype=float16: value should be one of <bfloat16|float32>."),
        (["edit", "--seed=-1"], "flag --seed=-1: -1 is not an integer in the range [0, 4294967295]."),
        (["edit", "picture.png"], "1 arguments given, 0 wanted."),
        (["edit", "--image=a.png", "--out=b.png"], "missing --model, --instruction."),
        (["train"], "missing --config, --workdir."),
        (["export", "--workdir=a"], "missing --out."),
        (["convert", "a"], "1 arguments given, 2 wanted."),
    ],
    ids=" ".join,
)
def test_usage_errors(capsys, argv, problem):
    assert small_run.fail(capsys, *argv)[:2] == (2, problem)


def test_an_error_that_was_not_foreseen_is_two_lines_too(capsys, monkeypatch):
    def broken(argv):
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("rcgrpo_jax.cli.edit.run", broken)
    code, _, err = small_run.run_command(capsys, "edit")
    assert code == 1
    first, second = err.splitlines()
    assert first == "rcgrpo edit: error: ZeroDivisionError: a b"
    assert "--debug" in second


@pytest.mark.parametrize(
    ("error", "code"), [(ZeroDivisionError(), 1), (UserError("a", "b"), 1), (UsageError("a", "b"), 2)]
)
def test_debug_shows_the_traceback_and_keeps_no_other_process_waiting(capsys, monkeypatch, error, code):
    def broken(argv):
        raise error

    left = []
    monkeypatch.setattr("rcgrpo_jax.cli.edit.run", broken)
    monkeypatch.setattr("rcgrpo_jax.parallel.distributed.exit_at_once", left.append)
    found, _, err = small_run.run_command(capsys, "edit", "--debug")
    assert (found, left) == (code, [code])
    assert err.startswith("Traceback")
    assert "in broken" in err


@pytest.mark.parametrize(
    ("reason", "way_out"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.", "rollout.micro_batch"),
        (
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 7.",
            "JAX_PLATFORMS",
        ),
    ],
)
def test_devices_that_are_full_or_taken_have_a_way_out(capsys, monkeypatch, reason, way_out):
    def fail(argv):
        raise RuntimeError(reason)

    monkeypatch.setattr("rcgrpo_jax.cli.train.run", fail)
    code, problem, remedy = small_run.fail(capsys, "train")
    assert code == 1
    assert reason in problem
    assert way_out in remedy


@pytest.mark.parametrize("command", ["report", "export"])
def test_what_only_reads_a_run_leaves_the_accelerator_to_it(capsys, monkeypatch, tmp_path, command):
    set_to = []
    monkeypatch.setattr("jax.config.update", lambda *field: set_to.append(field))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    small_run.fail(capsys, command, f"--workdir={tmp_path / 'none'}", f"--out={tmp_path / 'out'}")
    assert ("jax_platforms", "cpu") in set_to
    set_to.clear()
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    small_run.fail(capsys, command, f"--workdir={tmp_path / 'none'}", f"--out={tmp_path / 'out'}")
    assert not set_to


@pytest.mark.parametrize(
    "environ", [{"RCGRPO_NUM_PROCESSES": "2"}, {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2"}], ids=["ours", "slurm"]
)
def test_commands_for_one_process_refuse_to_be_several(capsys, monkeypatch, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, problem, _ = small_run.fail(capsys, "demo", "--out=nowhere")
    problem_wanted = "one of 2 processes; train, sft, evaluate, data encode alone spread their work over several."
    assert (code, problem) == (2, problem_wanted)


def test_interruption_from_the_keyboard_is_quiet(capsys, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("rcgrpo_jax.cli.edit.run", interrupted)
    assert small_run.run_command(capsys, "edit") == (130, "", "rcgrpo edit: interrupted\n")


def test_the_process_returns_the_code(tmp_path):
    argv = small_run.command("edit", f"--model={tmp_path}", "--image=a.png", "--instruction=b", "--out=c.png")
    run = subprocess.run(argv, env=small_run.environment(), capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 1
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 2
    debug = subprocess.run(
        [*argv, "--debug"], env=small_run.environment(), capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


# train


@pytest.fixture
def train_argv(tmp_path):
    """`train_argv(--config.X=...)`: a run on data of its own, in `tmp_path/data`."""
    small_run.write_data(tmp_path / "data")
    config = small_run.config_file(
        tmp_path / "config.py", data__path=str(tmp_path / "data"), data__cache=str(tmp_path / "cache")
    )
    given = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    return lambda *overrides: small_run.last_of_each(*given, *overrides)


def write_metadata(data: Path, **changes: str) -> None:
    """Makes the first example another one."""
    row = {"image": "0.png", "mask": "mask0.png", "instruction": "Paint it red."} | changes
    (data / "metadata.jsonl").write_text(json.dumps(row))


def half_size(data: Path) -> None:
    Image.new("L", (32, 32), 255).save(data / "mask0.png")


def black(data: Path) -> None:
    Image.new("L", (64, 64)).save(data / "mask0.png")


def no_image(data: Path) -> None:
    (data / "0.png").write_text("text")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (half_size, "0.png|the mask is 32 x 32 pixels; the image's 64 x 64 were wanted"),
        (black, "the mask is empty"),
        (no_image, "0.png: the file is not an image"),
        (lambda data: (data / "0.png").unlink(), "1 of the files that its examples need do not exist"),
        (lambda data: (data / "metadata.jsonl").unlink(), "no examples found"),
        (lambda data: write_metadata(data, instruction=" "), "the instruction is blank"),
        (lambda data: write_metadata(data, instruction="Make it nicer."), "'Make it nicer.': no colour is named"),
    ],
    ids=["mask-size", "empty-mask", "no-image", "missing-file", "no-examples", "blank", "no-colour"],
)
def test_train_names_what_is_wrong_with_the_data(capsys, tmp_path, train_argv, spoil, problem):
    spoil(tmp_path / "data")
    code, found, _ = small_run.fail(capsys, *train_argv())
    assert code == 1
    assert re.search(problem, found), found


@pytest.mark.parametrize(
    ("override", "code", "problem"),
    [
        ("data.path=nothing", 1, "nothing: there is no such folder or file."),
        ("model.path=nothing", 1, "model: nothing is not a folder."),
        ("acd.layers=9", 2, "config: acd.layers: 9; the model has 3 blocks."),
        ("data.size=(64,72)", 2, "config: data.size: (64, 72); two multiples of 16 pixels were wanted"),
        ("lora.targets=nothing", 2, "lora.targets: 'nothing' matches no linear layer of the transformer."),
        ("lora.targets=(", 2, "lora.targets: '(' is not a regular expression"),
        (
            "rollout.prompts=3",
            2,
            "config: rollout: P x G = 3 x 4 = 12 in micro-batches of 12 does not divide over data",
        ),
        ("mesh.tensor=3", 2, "mesh: data=-1, fsdp=1, tensor=3 does not multiply to the 8 devices found."),
    ],
    ids=lambda x: x if isinstance(x, str) and "=" in x and ":" not in x else "",
)
def test_train_refuses_settings_before_it_encodes(capsys, monkeypatch, train_argv, override, code, problem):
    monkeypatch.setattr(ModelFolder, "load", lambda *_: pytest.fail("the model was loaded"))
    found = small_run.fail(capsys, *train_argv(f"--config.{override}"))
    assert found[0] == code
    assert found[1].startswith(problem)


@pytest.mark.parametrize("told", [None, "/elsewhere"])
def test_compiled_programs_are_kept_beside_the_run_unless_jax_is_told_where(tmp_path, told):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", told)
        keep_compilations(tmp_path)
        assert jax.config.jax_compilation_cache_dir == (told or str(tmp_path / "compiled"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("override", ["workdir=gs://bucket/run", "config.data.cache=s3://bucket/cache"])
def test_train_refuses_a_url_for_a_directory(capsys, monkeypatch, tmp_path, train_argv, override):
    monkeypatch.chdir(tmp_path)
    code, problem, _ = small_run.fail(capsys, *train_argv(f"--{override}"))
    name, url = override.removeprefix("config.").split("=")
    assert code == 2
    assert f"{name}: '{url}' found; a directory was wanted" in problem
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["data"]


def test_train_refuses_a_workdir_that_is_a_file(capsys, tmp_path, train_argv):
    (tmp_path / "run").write_text("")
    code, problem, _ = small_run.fail(capsys, *train_argv())
    assert code == 1
    assert problem.startswith(f"workdir: {tmp_path / 'run'} cannot be made")


# export


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """Checkpoints 2 and 4 of a run that keeps an average."""
    path = tmp_path_factory.mktemp("export")
    trainer = small_run.make_trainer(optimizer__ema_decay=0.9)
    with Checkpointer(path / "checkpoints", save_every=2, keep=2) as checkpointer:
        for step in (2, 4):
            state = small_run.make_state(trainer, seed=step)
            state = state.replace(step=jnp.int32(step), ema=jax.tree.map(lambda x: x / 2, state.params))
            checkpointer.save(step, state, asdict(trainer.options))
    return path


@pytest.mark.parametrize("step", [None, 2])
def test_export_writes_the_average_of_a_step(capsys, tmp_path, workdir, step):
    argv = [f"--workdir={workdir}", f"--out={tmp_path / 'lora'}", *([] if step is None else [f"--step={step}"])]
    code, out, err = small_run.run_command(capsys, "export", "--dtype=float32", *argv)
    assert (code, err) == (0, "")
    assert out == f"LoRA: {tmp_path / 'lora' / 'pytorch_lora_weights.safetensors'}\n"
    trainer = small_run.make_trainer(optimizer__ema_decay=0.9)
    adapter, config = load_lora(tmp_path / "lora", trainer.params)
    assert (config.rank, config.alpha) == (4, 8.0)
    wanted = flatten_dict(small_run.make_state(trainer, seed=step or 4).params)
    for path, x in flatten_dict(adapter).items():
        np.testing.assert_array_equal(x, wanted[path] / 2)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--workdir=nothing"], "nothing/checkpoints: no checkpoint; it has none."),
        (["--workdir={workdir}", "--step=3"], "/checkpoints: no checkpoint of step 3; it has steps 2, 4."),
        (["--workdir={workdir}", "--out=text/lora"], "text/lora"),
    ],
    ids=["no-run", "no-step", "out"],
)
def test_export_refuses(capsys, tmp_path, monkeypatch, workdir, argv, problem):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("")
    code, found, _ = small_run.fail(
        capsys, *small_run.last_of_each("export", "--out=lora", *(arg.format(workdir=workdir) for arg in argv))
    )
    assert code == 1
    assert problem in found
    assert not Path("lora").exists()
