"""Supervised training: each stage learns, resumes bit for bit, and leaves what diffusers loads."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from PIL import Image
from references import diffusers, torch
from torch_parity import relative_error

from rcgrpo_jax.data.images import read_image, resize_image
from rcgrpo_jax.data.scenes.files import write_folder
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.editors.model import to_unit
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.flow import matching
from rcgrpo_jax.models.config import VAEConfig
from rcgrpo_jax.models.vae import VAE
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.metrics import MetricsWriter
from rcgrpo_jax.runs.run import StepFunction
from rcgrpo_jax.sft.config import default_config
from rcgrpo_jax.sft.stages import FlowStage
from rcgrpo_jax.sft.train import PICTURED, open_folder, train_supervised
from rcgrpo_jax.weights import export, random_folder
from rcgrpo_jax.weights.load import MANIFEST, ModelFolder
from rcgrpo_jax.weights.lora import LORA_FILE
from rcgrpo_jax.weights.networks import NETWORKS
from rcgrpo_jax.weights.tokenizers import T5_LENGTH

STEPS, BEFORE = 16, 14  # of the runs, and of the checkpoint before the last
SIZE = 32  # pixels; a token of the small autoencoder has 4 a side
TOKENS = 24
# Two resolutions instead of four: the autoencoder is what takes long to compile.
CONFIGS = small_run.TINY | {"vae": VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)}


@functools.cache
def start_folder() -> Path:
    return random_folder.build(small_run.workspace() / "sft-start", configs=CONFIGS)


def make_config(stage: str, **changes) -> ConfigDict:
    """Eight scenes in one batch, float32; `vae` starts at random, the others from its result. `__` stands for dots."""
    config = default_config()
    config.stage = stage
    config.model.update(dtype="float32", max_text_tokens=TOKENS, remat="none")
    config.model.path = changes.pop("model__path", None) or str(start_folder() if stage == "vae" else trained("vae"))
    config.data.update(path="scenes:train:8", size=(SIZE, SIZE))
    config.batch.size = 8
    config.flow.picture_steps = 2
    config.lora.update(rank=4, alpha=8.0, targets="all-linear")
    config.optimizer.update(learning_rate=5e-3, weight_decay=0.0)
    config.train.update(num_steps=STEPS, save_every=BEFORE, image_every=STEPS)
    for name, value in changes.items():
        *groups, field = name.split("__")
        functools.reduce(getattr, groups, config)[field] = value
    return config


@functools.cache
def trained(stage: str) -> Path:
    """The result of a run on one device; its workdir is the parent."""
    workdir = small_run.workspace() / f"sft-{stage}"
    train_supervised(make_config(stage), workdir, jax.devices()[:1])
    return workdir / ("lora" if stage == "lora" else "model")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def losses(stage: str) -> np.ndarray:
    lines = small_run.metrics_without_times(trained(stage).parent)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([line["loss"] for line in lines])


# What is learned


@pytest.mark.parametrize(
    ("stage", "share"),
    [
        pytest.param("vae", 0.5, marks=pytest.mark.slow),
        pytest.param("flow", 0.7, marks=pytest.mark.slow),
        ("lora", 0.85),
    ],
)
def test_the_loss_falls(stage, share):
    assert losses(stage)[-4:].mean() < share * losses(stage)[:4].mean()


@pytest.mark.parametrize("stage", ["vae", pytest.param("flow", marks=pytest.mark.slow), "lora"])
def test_a_picture_shows_a_few_examples_at_the_end(stage):
    (file,) = (trained(stage).parent / "images").iterdir()
    assert file.name == f"step_{STEPS:06d}.png"
    source, target, made = 160, 160, 160  # pixels of an enlarged example
    width, height = Image.open(file).size
    assert source + target + made < width < 2 * (source + target + made)
    assert PICTURED * target < height < 2 * PICTURED * target


@pytest.mark.slow
def test_the_flow_trains_transformer_and_text_encoders_and_leaves_the_rest():
    before, after = (small_run.tensors(folder) for folder in (trained("vae"), trained("flow")))
    assert before.keys() == after.keys()
    for name, x in before.items():
        same = np.array_equal(x, after[name])
        assert same == name.startswith("vae/") or not np.any(x), name  # a bias may be 0 and stay so
    assert all(np.isfinite(x).all() for x in after.values())
    assert files(trained("flow") / "vae") == files(trained("vae") / "vae")


def test_the_flow_draws_its_times_with_the_shift_asked_for(tmp_path, monkeypatch):
    config, heard = make_config("flow", flow__extra_shift=1.5), []
    mesh = make_mesh({}, jax.devices()[:1])
    stage = FlowStage(config, open_folder(config, tmp_path), mesh, tmp_path)
    draw = matching.sample_sigmas
    monkeypatch.setattr(matching, "sample_sigmas", lambda *args, **rest: heard.append(args[3]) or draw(*args, **rest))
    example = jax.tree.map(lambda x: x[0], stage.arrays(stage.batches()[0]))
    jax.eval_shape(stage.loss, stage.initial(jax.random.key(0)), stage.frozen(), jax.random.key(1), example)
    assert heard == [1.5]


def test_the_autoencoder_is_all_that_its_stage_changes():
    before, after = files(start_folder()), files(trained("vae"))
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip


def test_an_adapter_is_all_that_its_stage_leaves():
    assert sorted(files(trained("lora"))) == [LORA_FILE]
    assert all(np.any(x) for x in small_run.tensors(trained("lora")).values())  # B too


# Stopped and resumed, on more devices, in smaller batches


@pytest.mark.slow
def test_an_adapter_learns_on_a_quantised_base(tmp_path):
    """The base is close to the float one, and not the same."""
    train_supervised(
        make_config("lora", model__quantization="int8", model__remat="full"), tmp_path / "run", jax.devices()[:1]
    )
    assert small_run.tensors(tmp_path / "run" / "lora").keys() == small_run.tensors(trained("lora")).keys()
    found = np.array([line["loss"] for line in small_run.metrics_without_times(tmp_path / "run")])
    np.testing.assert_allclose(found, losses("lora"), rtol=0.05)
    assert found[0] != losses("lora")[0]


def unfinished(stage: str, folder: Path) -> Path:
    """A copy of a run as it was at the checkpoint before the end."""
    workdir = Path(shutil.copytree(trained(stage).parent, folder))
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    shutil.rmtree(workdir / trained(stage).name)
    return workdir


def record_steps(patch: pytest.MonkeyPatch, after: Callable[[int], None] = lambda step: None) -> list[int]:
    """The steps taken from now on: a run that starts over ends at the same bits. `after` is called at their ends."""
    taken, scalars = [], MetricsWriter.scalars

    def record(self, step, metrics):
        scalars(self, step, metrics)
        taken.append(step)
        after(step)

    patch.setattr(MetricsWriter, "scalars", record)
    return taken


def resume(stage: str, folder: Path, devices: int, **changes) -> Path:
    """The last steps once more, and no others."""
    workdir = unfinished(stage, folder)
    with pytest.MonkeyPatch.context() as patch:
        taken = record_steps(patch)
        # To save time.
        patch.setattr(FlowStage, "picture", lambda self, trained, frozen, example: to_unit(example.source))
        result = train_supervised(make_config(stage, **changes), workdir, jax.devices()[:devices])
    assert taken == list(range(BEFORE + 1, STEPS + 1))
    assert result in (workdir / "model", workdir / "lora" / LORA_FILE)
    return workdir / trained(stage).name


@pytest.mark.parametrize("stage", [pytest.param("flow", marks=pytest.mark.slow), "lora"])
def test_a_resumed_run_ends_where_the_first_did_bit_for_bit(stage, tmp_path):
    result = resume(stage, tmp_path / "run", devices=1)
    found, wanted = small_run.tensors(result), small_run.tensors(trained(stage))
    assert {name: x.tobytes() for name, x in found.items()} == {name: x.tobytes() for name, x in wanted.items()}
    assert small_run.metrics_without_times(result.parent) == small_run.metrics_without_times(trained(stage).parent)


@pytest.mark.slow
def test_eight_devices_and_micro_batches_compute_the_same(tmp_path):
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    result = resume("lora", tmp_path / "run", devices=8, batch__micro_batch=4, **mesh)
    found, wanted = (small_run.metrics_without_times(path.parent) for path in (result, trained("lora")))
    assert found[-2] == pytest.approx(wanted[-2], rel=1e-5)  # from the same parameters
    assert found[-1] == pytest.approx(wanted[-1], rel=1e-3)
    found, wanted = (
        np.concatenate([x.ravel() for x in small_run.tensors(path).values()]) for path in (result, trained("lora"))
    )
    assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(tmp_path, monkeypatch, caplog):
    def interrupt(step: int) -> None:
        if step == BEFORE + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    workdir = unfinished("vae", tmp_path / "run")
    taken = record_steps(monkeypatch, interrupt)
    assert train_supervised(make_config("vae"), workdir, jax.devices()[:1]) is None
    assert f"stopped at step {BEFORE + 1} on request" in caplog.text
    assert (workdir / "checkpoints" / str(BEFORE + 1)).is_dir()
    assert not (workdir / "model").exists()
    assert train_supervised(make_config("vae"), workdir, jax.devices()[:1]) == workdir / "model"
    assert taken == [BEFORE + 1, STEPS]
    assert files(workdir / "model") == files(trained("vae"))


def test_another_configuration_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    workdir = shutil.copytree(trained("lora").parent, tmp_path / "run")
    monkeypatch.setattr(ModelFolder, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"flow.region_weight: checkpoint 1.0, config 2.0"):
        train_supervised(make_config("lora", flow__region_weight=2.0), workdir)
    assert files(workdir) == files(trained("lora").parent)


def idle(*_) -> StepFunction:
    """In place of `make_step`: steps that learn nothing and take no time."""
    return lambda state, index, draw: (state.replace(step=state.step + 1), {"loss": 0.0}, None)


def test_other_data_are_refused(tmp_path, monkeypatch):
    """Under the same path; only the stage that has read all of them beforehand can tell."""
    monkeypatch.setattr("rcgrpo_jax.sft.train.make_step", idle)
    data = tmp_path / "data"
    write_folder(Scenes("train", 8, SIZE), data)
    table = data / "metadata.jsonl"
    lines = [line.replace('"mask"', '"other"') for line in table.read_text().splitlines()]  # masks are not needed
    table.write_text("\n".join(lines))
    config = make_config("lora", data__path=str(data), train__num_steps=1)
    train_supervised(config, tmp_path / "run", jax.devices()[:1])
    table.write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match="data_digest: checkpoint"):
        train_supervised(config, tmp_path / "run", jax.devices()[:1])


# What diffusers makes of the results


@functools.cache
def pipeline(stage: str) -> diffusers.FluxKontextPipeline:
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(
        trained("vae" if stage == "lora" else stage), dtype=torch.float32
    )
    if stage == "lora":
        pipeline.load_lora_weights(trained("lora"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b.astype(float)).mean(), 1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["flow", "lora"])
def test_an_edit_is_that_of_diffusers(stage, tmp_path, capsys):
    scene, noise = Scenes("train", 8, SIZE)[1], np.random.default_rng(0).standard_normal((64, 64), np.float32)
    Image.fromarray(scene.image).save(tmp_path / "in.png")
    np.save(tmp_path / "noise.npy", noise)

    def edit(*more: str) -> np.ndarray:
        code, _, err = small_run.run_command(
            capsys, "edit", f"--image={tmp_path / 'in.png'}", f"--instruction={scene.instruction}", "--steps=2",
            f"--out={tmp_path / 'out.png'}", f"--size={SIZE}x{SIZE}", f"--noise={tmp_path / 'noise.npy'}",
            "--dtype=float32", f"--text_tokens={TOKENS}", *more,
        )  # fmt: skip
        assert (code, err) == (0, "")
        return read_image(tmp_path / "out.png")

    (theirs,) = pipeline(stage)(
        image=Image.fromarray(scene.image), prompt=scene.instruction, latents=torch.from_numpy(noise)[None],
        height=SIZE, width=SIZE, num_inference_steps=2, guidance_scale=2.5, max_sequence_length=TOKENS,
        max_area=SIZE * SIZE, _auto_resize=False,
    ).images  # fmt: skip
    before = edit(f"--model={trained('vae')}")
    after = edit(f"--model={trained('flow')}" if stage == "flow" else f"--model={trained('vae')}", *(
        [f"--lora={trained('lora')}"] if stage == "lora" else []
    ))  # fmt: skip
    assert psnr(after, np.asarray(theirs)) > 60
    assert psnr(after, before) < 40


def test_the_autoencoder_of_diffusers_has_latents_of_unit_variance():
    scenes, theirs = Scenes("train", 8), pipeline("vae").vae
    images = np.stack([resize_image(x, (SIZE, SIZE)) for i in range(8) for x in (scenes[i].image, scenes[i].target)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        raw = theirs.encode(pixels).latent_dist.mode()
        made = theirs.decode(raw[:2]).sample
    latents = (raw - theirs.config.shift_factor) * theirs.config.scaling_factor
    assert (latents.mean().item(), latents.std().item()) == pytest.approx((0, 1), abs=1e-3)
    folder = ModelFolder(trained("vae"))
    ours = jax.jit(VAE(folder.config("vae")).apply)({"params": folder.load("vae")}, to_unit(images[:2]))
    assert relative_error(ours.transpose(0, 3, 1, 2), made) < 1e-5


# The command


def test_the_command_says_where_the_result_is(tmp_path, capsys, caplog):
    workdir = Path(shutil.copytree(trained("lora").parent, tmp_path / "run"))
    shutil.rmtree(workdir / "lora")
    code, out, err = small_run.run_command(capsys, *command(tmp_path, workdir, make_config("lora")))
    assert code == 0, err
    assert f"nothing to do: train.num_steps is {STEPS}" in caplog.text
    assert out.splitlines() == [
        f"LoRA         {workdir / 'lora' / LORA_FILE}",
        f"checkpoints  {workdir / 'checkpoints'}",
        f"metrics      {workdir / 'metrics.jsonl'}",
        f"tensorboard  {workdir / 'tensorboard'}",
        f"images       {workdir / 'images'}",
    ]
    assert small_run.tensors(workdir / "lora").keys() == small_run.tensors(trained("lora")).keys()


def command(folder: Path, workdir: Path, config: ConfigDict) -> list[str]:
    """`rcgrpo sft` of a configuration, which is written out to a file."""
    file = folder / "config.py"
    file.write_text(
        "import json\n"
        "from rcgrpo_jax.sft.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.update(json.loads({json.dumps(config.to_dict())!r}))\n"
        "    return config\n"
    )
    return ["sft", f"--config={file}", f"--workdir={workdir}"]


def test_messages_name_the_right_defaults(tmp_path, capsys):
    argv = command(tmp_path, tmp_path / "run", make_config("vae"))
    code, _, err = small_run.run_command(capsys, *argv, "--config.flow.region_wieght=2")
    assert code == 2
    assert "Did you mean --config.flow.region_weight?" in err
    assert "rcgrpo_jax/sft/options.py lists the fields" in err
    (tmp_path / "config.py").write_text("def get_config(): return {}")
    code, _, err = small_run.run_command(capsys, *argv)
    assert code == 1
    assert "starts from rcgrpo_jax.sft.config.default_config()" in err


# Data


@pytest.mark.parametrize("stage", ["vae", "lora"])
def test_an_unreadable_image_ends_a_run_in_two_lines(stage, tmp_path, capsys):
    data = small_run.write_broken_scenes(tmp_path / "data", SIZE)
    config = make_config(stage, data__path=str(data))
    code, out, err = small_run.run_command(capsys, *command(tmp_path, tmp_path / "run", config))
    lines = [line for line in err.splitlines() if not line.startswith("encode: ")]
    assert (code, out, len(lines)) == (1, "", 2)
    assert "the file is not an image" in lines[0]


@pytest.mark.parametrize("stage", ["vae", "lora"])
def test_examples_without_targets_are_refused(stage, tmp_path):
    config = make_config(stage, data__path=str(small_run.data_folder()), data__size=(64, 64))
    with pytest.raises(UserError, match=r"0000\d-.*: no target image; supervised training needs one"):
        train_supervised(config, tmp_path, jax.devices()[:1])


# Models and disks


@pytest.mark.parametrize("stage", ["vae", "flow"])
def test_a_converted_model_is_no_start_for_networks(stage, tmp_path):
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=f"is a converted model; stage {stage} writes a diffusers folder"):
        train_supervised(make_config(stage, model__path=str(tmp_path)), tmp_path / "run")


@pytest.mark.parametrize("field", ["data__size", "vae__crop"])
def test_sizes_that_are_no_multiples_of_the_models_token_are_refused(field, tmp_path, monkeypatch):
    monkeypatch.setattr(VAEConfig, "downscale", 16)
    change = (48, 64) if field == "data__size" else 16
    config = make_config("vae", **{"data__size": (64, 64), field: change})
    with pytest.raises(UsageError, match="this model's tokens are 32 pixels a side"):
        open_folder(config, tmp_path)


def test_targets_that_match_no_layer_are_refused_before_texts_are_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelFolder, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match="'nothing' matches no linear layer"):
        train_supervised(make_config("lora", lora__targets="nothing"), tmp_path)


def test_a_mesh_that_splits_a_head_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelFolder, "load", lambda *_: pytest.fail("the model was loaded"))
    config = make_config("lora", model__path=str(start_folder()), mesh__data=1, mesh__tensor=4)
    with pytest.raises(UsageError, match=r"mesh\.tensor: 4; the model has 2 heads"):
        train_supervised(config, tmp_path, jax.devices()[:4])


def test_a_run_without_a_model_starts_a_small_editor_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(random_folder, "EDITOR", CONFIGS)
    monkeypatch.setattr(random_folder, "EDITOR_TEXT_TOKENS", T5_LENGTH)
    config = make_config("vae")
    config.model.path = ""
    (tmp_path / "start").mkdir()  # what a kill in the middle leaves
    folder = open_folder(config, tmp_path)
    assert files(folder.path) == files(start_folder())
    assert open_folder(config, tmp_path).path == folder.path


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("rcgrpo_jax.sft.train.make_step", idle)
    monkeypatch.setattr(Checkpointer, "_free_bytes", lambda self: 10)
    with pytest.raises(UserError, match=f"No space left on device: the checkpoint of step {STEPS}") as error:
        resume("vae", tmp_path / "run", devices=1)
    assert error.value.remedy.endswith(f"it resumes from step {BEFORE}.")


@pytest.mark.parametrize("stage", ["vae", "lora"])
def test_a_result_that_cannot_be_written_leaves_the_earlier_one(stage, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    workdir = Path(shutil.copytree(trained(stage).parent, tmp_path / "run"))
    monkeypatch.setattr("safetensors.numpy.save_file", full)  # of networks
    monkeypatch.setattr(Path, "write_bytes", full)  # of LoRAs
    with pytest.raises(UserError, match=r"result cannot be written to .*No space left") as error:
        train_supervised(make_config(stage), workdir, jax.devices()[:1])
    assert "run the same command" in error.value.remedy
    assert files(workdir / trained(stage).name) == files(trained(stage))


def test_a_folder_is_replaced_whole_and_may_hold_its_copy(tmp_path):
    start = Path(shutil.copytree(start_folder(), tmp_path / "start"))
    config, vae = ModelFolder(start).config("vae"), ModelFolder(start).load("vae")
    for dtype in ("float32", "bfloat16", "float16"):
        target = export.save_folder(start, start / "model", {"vae": (config, vae)}, dtype)
        found = flatten_dict(ModelFolder(target).load("vae"))
        for path, x in flatten_dict(vae).items():
            assert found[path].dtype == dtype
            np.testing.assert_array_equal(found[path], x.astype(dtype))
    assert not list(start.glob(".*"))
    assert files(target / "transformer") == files(start / "transformer")
    assert all((target / name / "config.json").is_file() for name in NETWORKS)
