"""A training run small enough for tests: model, data and configuration, made once a session."""

import atexit
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file

from rcgrpo_jax import rewards
from rcgrpo_jax.cli.main import main
from rcgrpo_jax.data.scenes.files import write_folder
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.encoding.batches import EditBatch
from rcgrpo_jax.encoding.encode import encode
from rcgrpo_jax.models.config import CLIPTextConfig, MMDiTConfig, T5Config, VAEConfig
from rcgrpo_jax.options import read_options
from rcgrpo_jax.parallel.mesh import AXES, make_mesh
from rcgrpo_jax.parallel.sharding import replicated
from rcgrpo_jax.rl.config import default_config, validate
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.setup import check_scorable
from rcgrpo_jax.rl.trainer import Trainer
from rcgrpo_jax.runs.metrics import read_metrics
from rcgrpo_jax.runs.state import TrainState, init_state
from rcgrpo_jax.weights import random_folder

ROOT = Path(__file__).parents[1]
TINY = {
    "transformer": MMDiTConfig(
        num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    ),
    "vae": VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
    "text_encoder": CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
    "text_encoder_2": T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2),
}  # fmt: skip
# The right and lower edges of the region do not fall on the token grid; the last example's mask is soft.
EDITS = (
    ("Paint the box red.", (8, 40, 8, 40)),
    ("Make it blue.", (20, 60, 0, 30)),
    ("Turn it green.", (4, 24, 30, 64)),
)


@functools.cache
def workspace() -> Path:
    """A folder of this session, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="rcgrpo-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Runs that differ in length only, or that a subprocess resumes, compile the same programs: once is enough, also for the
# next session.
COMPILATION_CACHE = {
    "compilation_cache_dir": os.environ["RCGRPO_TESTS_COMPILED"],  # of conftest.py
    "compilation_cache_max_size": 2**29,  # bytes; those read longest ago go first
    "persistent_cache_min_compile_time_secs": 0.1,  # to keep a program takes as long, by then
    "persistent_cache_min_entry_size_bytes": -1,
}
for name, value in COMPILATION_CACHE.items():
    jax.config.update(f"jax_{name}", value)


@functools.cache
def model_folder() -> Path:
    """A diffusers folder with random weights, smaller still than `random_folder.SMALL`."""
    return random_folder.build(workspace() / "model", configs=TINY)


@functools.cache
def data_folder() -> Path:
    """Three examples of 64 x 64 pixels with a `metadata.jsonl`."""
    return write_data(workspace() / "data")


def write_data(folder: Path) -> Path:
    """Writes the examples of `EDITS`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i, (instruction, (top, bottom, left, right)) in enumerate(EDITS):
        image = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((64, 64)))
        mask = np.zeros((64, 64), np.uint8)
        mask[top:bottom, left:right] = 255 if i < 2 else 128
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(mask).save(folder / f"mask{i}.png")
        rows.append({"image": f"{i}.png", "mask": f"mask{i}.png", "instruction": instruction})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_broken_scenes(folder: Path, size: int) -> Path:
    """Eight scenes of `size` pixels a side, of which the one named 00005 has no readable image."""
    write_folder(Scenes("train", 8, size), folder)
    (image,) = (folder / "images").glob("*00005*")
    image.write_text("text")
    return folder


def make_config(**changes) -> ConfigDict:
    """The configuration: P = 2, G = 4, B = 2, K = 4, float32; `changes` have `__` for the dots of a field's name."""
    config = default_config()
    config.model.update(path=str(model_folder()), dtype="float32", max_text_tokens=16)
    config.data.update(path=str(data_folder()), size=(64, 64), cache=str(workspace() / "encoded"))
    config.lora.update(rank=4, alpha=8.0)
    config.rollout.update(prompts=2, group_size=4, num_steps=4)
    config.explore.update(alpha_edit=0.3, sigma=0.3)
    config.surrogate.update(anchors=2, distance="region", steps="all")
    config.acd.layers = 2
    config.optimizer.weight_decay = 0.0
    config.train.update(num_steps=4, save_every=2, image_every=2)
    for name, value in changes.items():
        *groups, field = name.split("__")
        functools.reduce(getattr, groups, config)[field] = value
    return config


def make_options(**changes) -> Options:
    """As `make_config`, below a set-up."""
    return read_options(Options, make_config(**changes))


@functools.cache
def load_editor(mesh_shape: tuple[int, ...], dtype: str) -> tuple[FluxKontextEditor, Mesh]:
    """The editor on the first devices, as `rl.trainer.train` loads it."""
    mesh = make_mesh(dict(zip(AXES, mesh_shape, strict=True)), jax.devices()[: math.prod(mesh_shape)])
    config = make_config()
    options = EditorOptions(dtype, attention="xla", remat=config.model.remat, acd_layers=config.acd.layers)
    return FluxKontextEditor(FluxKontext(model_folder()), options, mesh), mesh


@functools.cache
def make_trainer(mesh_shape: tuple[int, ...] = (1, 1, 1), **changes) -> Trainer:
    """A trainer of the run, compiled once for equal arguments; `changes` as in `make_config`."""
    config = make_config(**changes)
    editor, mesh = load_editor(mesh_shape, config.model.dtype)
    validate(config, mesh.size)
    with jax.set_mesh(mesh):
        options = read_options(Options, config)
        return Trainer(options, editor, mesh, {name: rewards.make(name) for name in options.rewards})


def make_batch(trainer: Trainer, step: int = 0) -> EditBatch:
    """The batch of a step; encoders run once a session."""
    mesh = trainer.programs.mesh
    with jax.set_mesh(mesh):
        options, model = trainer.options, FluxKontext(model_folder())
        check = functools.partial(check_scorable, trainer.rewards)
        data = (options.data, options.model, model, workspace(), mesh)
        return encode(*data, options.rollout.prompts, options.seed, check)[step]


def make_state(trainer: Trainer, seed: int = 0) -> TrainState:
    """A state in which the adapter does something: B is drawn too, and the average, if kept, differs from it."""
    options = trainer.options
    state = init_state(options.lora, options.optimizer, options.seed, trainer.params)
    rng = np.random.default_rng(seed)

    def draw(path, x):
        return jnp.asarray(0.05 * rng.standard_normal(x.shape, np.float32)) if path[-1].key == "B" else x

    state = state.replace(params=jax.tree_util.tree_map_with_path(draw, state.params))
    return jax.device_put(state, replicated(trainer.programs.mesh))


def take_step(trainer: Trainer, state: TrainState, batch: EditBatch):
    """`Trainer.step` on its mesh, of a copy: the original stays usable."""
    with jax.set_mesh(trainer.programs.mesh):
        return trainer.step(jax.tree.map(jnp.copy, state), trainer.prepare(batch))[:3]


def run_command(capsys, *argv: str) -> tuple[int, str, str]:
    """`rcgrpo ARGV` in this process: exit code, standard output, and standard error without the line on devices."""
    capsys.readouterr()
    try:
        code = main(list(argv))
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, re.sub("^devices: .*\n", "", err, flags=re.MULTILINE)


def last_of_each(*argv: str) -> list[str]:
    """Arguments of which a later `--FLAG=VALUE` replaces an earlier one, but for `--variant`, which takes several."""
    return list({arg if arg.startswith("--variant=") else arg.partition("=")[0]: arg for arg in argv}.values())


def fail(capsys, *argv: str) -> tuple[int, str, str]:
    """Runs a command that must fail: exit code, problem and remedy."""
    code, out, err = run_command(capsys, *argv)
    lines = [line for line in err.splitlines() if not line.startswith("encode: ")]
    assert out == ""
    assert code in (1, 2)
    assert "Traceback" not in err
    assert "not foreseen" not in err
    assert lines[0].startswith(f"rcgrpo {argv[0]}: error: ")
    assert all(line.startswith(" " * 8) for line in lines[1:-1])  # a list of problems
    assert re.match(r"  \S", lines[-1])
    return code, "\n".join(lines[:-1]).split(": error: ", 1)[1], lines[-1].strip()


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "rcgrpo_jax.cli.main", *argv]


def environment() -> dict[str, str]:
    """The variables of a process that computes as this one does and shares its compilations."""
    cache = {f"JAX_{name.upper()}": str(value) for name, value in COMPILATION_CACHE.items()}
    quick = str(int(jax.config.read("jax_disable_most_optimizations")))
    return {
        **os.environ, **cache, "JAX_DISABLE_MOST_OPTIMIZATIONS": quick, "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Of all safetensors in a folder, by file and name."""
    return {
        f"{file.relative_to(folder)}/{name}": x
        for file in sorted(folder.rglob("*.safetensors"))
        for name, x in load_file(file).items()
    }


def config_file(path: Path, body: str = "", config: ConfigDict | None = None, **changes) -> Path:
    """Writes a Python file whose `get_config()` gives `config`, or `make_config(**changes)`; `body` runs before.

    The configuration is written out as JSON: a subprocess has another workspace.
    """
    config = make_config(**changes) if config is None else config
    values, room = json.dumps(config.to_dict()), "sft" if "stage" in config else "rl"
    path.write_text(
        "import json, os\n"
        f"from rcgrpo_jax.{room}.config import default_config\n"
        f"{body}\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.update(json.loads({values!r}))\n"
        "    return config\n"
    )
    return path


def signal_after(step: int, signal: str, checkpoint: Path | None = None, process: int = 0) -> str:
    """What a configuration file adds to a run: a signal to itself at the end of a step, once a checkpoint is there.

    Args:
        step: Counted from 1.
        signal: For example SIGTERM.
        checkpoint: Waited for.
        process: The one that gets it, where there are several.
    """
    return f"""
from rcgrpo_jax.runs.metrics import MetricsWriter
import jax, os, signal, time
scalars = MetricsWriter.scalars
def interrupt(self, step, metrics):
    scalars(self, step, metrics)
    if step == {step} and jax.process_index() == {process}:
        while not os.path.isdir({str(checkpoint or "/")!r}):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.{signal})
MetricsWriter.scalars = interrupt
"""


def metrics_without_times(workdir: Path) -> list[dict]:
    """The lines of `metrics.jsonl` without what differs from run to run."""
    timed = ("time", "samples_per_second")
    return [
        {name: x for name, x in line.items() if name not in timed and not name.startswith("seconds/")}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]
