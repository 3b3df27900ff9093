"""The command line: what it makes, and two lines with a way out whatever a user gets wrong."""

import json
import re
import subprocess
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
from rcgrpo_jax.data.images import read_image, resize_image
from rcgrpo_jax.editor import Editor
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter
from rcgrpo_jax.training.checkpoint import Checkpointer
from rcgrpo_jax.weights.export import load_lora, save_lora
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.networks import abstract_params

pytestmark = pytest.mark.usefixtures("quick_compilation")


def fail(capsys, *argv: str) -> tuple[int, str, str]:
    """Runs a command that must fail: exit code, problem and remedy."""
    code, out, err = small_run.run_command(capsys, *argv)
    lines = [line for line in err.splitlines() if not line.startswith("encode: ")]
    assert out == ""
    assert code in (1, 2)
    assert "Traceback" not in err
    assert "not foreseen" not in err
    assert lines[0].startswith(f"rcgrpo {argv[0]}: error: ")
    assert all(line.startswith(" " * 8) for line in lines[1:-1])  # a list of problems
    assert re.match(r"  \S", lines[-1])
    return code, "\n".join(lines[:-1]).split(": error: ", 1)[1], lines[-1].strip()


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
    assert fail(capsys, *argv)[:2] == (2, problem)


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
    monkeypatch.setattr("rcgrpo_jax.parallel.distributed.leave", left.append)
    found, _, err = small_run.run_command(capsys, "edit", "--debug")
    assert (found, left) == (code, [code])
    assert err.startswith("Traceback")
    assert "in broken" in err


def test_too_little_memory_says_what_takes_less(capsys, monkeypatch):
    def full(argv):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr("rcgrpo_jax.cli.train.run", full)
    code, problem, remedy = fail(capsys, "train")
    assert code == 1
    assert "Out of memory" in problem
    assert "rollout.micro_batch" in remedy


@pytest.mark.parametrize(
    "environ", [{"RCGRPO_NUM_PROCESSES": "2"}, {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2"}], ids=["ours", "slurm"]
)
def test_commands_for_one_process_refuse_to_be_several(capsys, monkeypatch, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, problem, _ = fail(capsys, "demo", "--out=nowhere")
    assert (code, problem) == (2, "one of 2 processes; train and pretrain alone spread their work over several.")


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


# edit


@pytest.fixture
def edit_argv(tmp_path, monkeypatch):
    """`edit_argv(image=..., ...)`: the arguments of an edit that works, but for the changes; None leaves one out."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((80, 60), 50).convert("RGB").save("image.png")

    def make(**changes: str | None) -> list[str]:
        flags = {
            "model": str(small_run.model_folder()), "image": "image.png", "instruction": "Make it red.",
            "out": "out.png", "size": "64x64", "steps": "2", "dtype": "float32", "text_tokens": "16",
        }  # fmt: skip
        return ["edit", *(f"--{name}={value}" for name, value in (flags | changes).items() if value is not None)]

    return make


@pytest.mark.parametrize(
    ("changes", "code", "problem"),
    [
        ({"image": "nothing.png"}, 1, "nothing.png: there is no such file"),
        ({"image": "text.png"}, 1, "text.png: the file is not an image"),
        ({"image": "."}, 1, ".: the file cannot be read to its end"),
        ({"size": "64"}, 2, "--size: '64' found; WIDTHxHEIGHT in pixels was wanted."),
        ({"size": "0x64"}, 2, "--size: '0x64' found"),
        ({"size": "64x65"}, 2, "--size: 64x65 found; multiples of 16 pixels were wanted."),
        ({"noise": "nothing.npy"}, 1, "--noise: nothing.npy cannot be read as .npy"),
        ({"noise": "text.png"}, 1, "--noise: text.png cannot be read as .npy"),
        ({"noise": "shape.npy"}, 1, "--noise: shape.npy is float32 [15, 64]; finite float32 [16, 64] was wanted."),
        ({"noise": "dtype.npy"}, 1, "--noise: dtype.npy is float64 [16, 64]"),
        ({"noise": "nan.npy"}, 1, "--noise: nan.npy is float32 [16, 64]; finite"),
        ({"noise": "archive.npz"}, 1, "--noise: archive.npz is an archive of arrays; one was wanted."),
        ({"instruction": " \t"}, 2, "--instruction: blank"),
        ({"guidance": "nan"}, 2, "--guidance: nan found; a number was wanted."),
        ({"lora": "nothing"}, 1, "lora: nothing does not exist."),
        ({"lora": "text.png"}, 1, "text.png: "),
        ({"model": "nothing"}, 1, "model: nothing is not a folder."),
        ({"model": "."}, 1, "model: . holds neither model_index.json (diffusers) nor rcgrpo.json"),
        ({"out": "out.jpg"}, 1, "--out: out.jpg: the suffix is '.jpg'; '.png' was wanted."),
        ({"out": "text.png/out.png"}, 1, "--out: text.png/out.png cannot be written"),
        ({"out": "/proc/out.png"}, 1, "--out: /proc/out.png cannot be written"),
        ({"out": "folder.png"}, 1, "--out: folder.png cannot be written"),
    ],
    ids=lambda x: "-".join(f"{name}={value.strip()}" for name, value in x.items()) if isinstance(x, dict) else "",
)
def test_edit_refuses_before_it_loads_the_model(capsys, monkeypatch, edit_argv, changes, code, problem):
    monkeypatch.setattr(ModelFolder, "load", lambda *_: pytest.fail("the model was loaded"))
    Path("text.png").write_text("text")
    Path("folder.png").mkdir()
    np.save("shape.npy", np.zeros((15, 64), np.float32))
    np.save("dtype.npy", np.zeros((16, 64)))
    np.save("nan.npy", np.full((16, 64), np.nan, np.float32))
    np.savez("archive.npz", np.zeros((16, 64), np.float32))
    found = fail(capsys, *edit_argv(**changes))
    assert found[0] == code
    assert found[1].startswith(problem)
    assert not Path("out.png").exists()


def save_test_image(kind: str) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (60, 80), np.uint8)
    colour = rng.integers(0, 256, (60, 80, 3), np.uint8)
    match kind:
        case "RGBA":
            Image.fromarray(np.dstack([colour, grey])).save("image.png")
        case "16-bit":
            Image.fromarray(grey.astype(np.uint16) * 257).save("image.png")
        case "EXIF":
            exif = Image.Exif()
            exif[0x0112] = 6  # turn by a quarter
            Image.fromarray(colour).save("image.png", exif=exif)
        case "1-pixel":
            Image.new("RGB", (1, 1), "teal").save("image.png")


@pytest.mark.parametrize("kind", ["RGBA", "16-bit", "EXIF", "1-pixel"])
def test_edit_takes_any_image(capsys, monkeypatch, edit_argv, kind):
    """The model itself is left out: what it is given is what is written."""
    monkeypatch.setattr(Editor, "edit", lambda self, images, *_: images)
    save_test_image(kind)
    code, out, err = small_run.run_command(capsys, *edit_argv(size="32x64", out="made/here/out.PNG"))
    assert (code, err) == (0, "")
    assert out == "edited image: made/here/out.PNG (32 x 64)\n"
    np.testing.assert_array_equal(read_image("made/here/out.PNG"), resize_image(read_image("image.png"), (64, 32)))


def test_the_size_is_kontexts_by_default(capsys, monkeypatch, edit_argv):
    monkeypatch.setattr(Editor, "edit", lambda self, images, *_: images)
    assert small_run.run_command(capsys, *edit_argv(size=None))[0] == 0
    assert Image.open("out.png").size == (1184, 880)


def edit(capsys, argv: list[str]) -> np.ndarray:
    code, _, err = small_run.run_command(capsys, *argv)
    assert (code, err) == (0, "")
    return read_image("out.png")


def test_edit_follows_its_arguments(capsys, edit_argv, caplog):
    plain = edit(capsys, edit_argv())
    assert plain.shape == (64, 64, 3)
    np.save("noise.npy", np.asarray(jax.random.normal(jax.random.key(7), (16, 64))))
    seeded = edit(capsys, edit_argv(seed="7"))
    np.testing.assert_array_equal(seeded, edit(capsys, edit_argv(noise="noise.npy")))
    params = abstract_params("transformer", ModelFolder(small_run.model_folder()).config("transformer"))
    adapter = init_adapter(jax.random.key(0), params, LoRAConfig(2, 4.0))
    save_lora(Path("zero"), adapter, LoRAConfig(2, 4.0))
    np.testing.assert_array_equal(plain, edit(capsys, edit_argv(lora="zero")))
    save_lora(Path("lora"), jax.tree.map(lambda x: x + 0.1, adapter), LoRAConfig(2, 4.0))
    assert not caplog.records

    for other in (
        seeded,
        edit(capsys, edit_argv(lora="lora")),
        edit(capsys, edit_argv(instruction="Füge einen Regenbogen hinzu 🌈 彩虹")),
        edit(capsys, edit_argv(guidance="5")),
    ):
        assert np.any(other != plain)


def test_a_long_instruction_is_cut_with_a_warning(capsys, edit_argv, caplog):
    words = "Make the big red ball small and the small blue cube very big."
    cut = edit(capsys, edit_argv(instruction=f"{words} {words} {words}"))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "T5 tokens is cut to max_text_tokens = 16" in record.getMessage()
    assert cut.shape == (64, 64, 3)


# train


@pytest.fixture
def train_argv(tmp_path):
    """`train_argv(--config.X=...)`: a run on data of its own, in `tmp_path/data`."""
    small_run.write_data(tmp_path / "data")
    config = small_run.config_file(
        tmp_path / "config.py", data__path=str(tmp_path / "data"), data__cache=str(tmp_path / "cache")
    )
    return lambda *overrides: ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *overrides]


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
    code, found, _ = fail(capsys, *train_argv())
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
    found = fail(capsys, *train_argv(f"--config.{override}"))
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


def test_train_refuses_a_workdir_that_is_a_file(capsys, tmp_path, train_argv):
    (tmp_path / "run").write_text("")
    code, problem, _ = fail(capsys, *train_argv())
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
            checkpointer.save(step, state, trainer.config.to_dict())
    return path


@pytest.mark.parametrize("step", [None, 2])
def test_export_writes_the_average_of_a_step(capsys, tmp_path, workdir, step):
    argv = [f"--workdir={workdir}", f"--out={tmp_path / 'lora'}", *([] if step is None else [f"--step={step}"])]
    code, out, err = small_run.run_command(capsys, "export", *argv)
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
    code, found, _ = fail(capsys, "export", "--out=lora", *(arg.format(workdir=workdir) for arg in argv))
    assert code == 1
    assert problem in found
    assert not Path("lora").exists()
