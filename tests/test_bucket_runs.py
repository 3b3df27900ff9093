"""Runs on pictures of two shapes, each of which has a bucket: training, resuming, and encoding ahead."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
import small_run
from PIL import Image

from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.encoding.cache import EncodedSource
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rl import programs
from rcgrpo_jax.rl.trainer import Trainer, train
from rcgrpo_jax.sft.config import default_config as sft_config
from rcgrpo_jax.sft.config import validate as validate_sft
from rcgrpo_jax.sft.train import train_supervised

WIDE, UPRIGHT = (48, 96), (96, 48)
SHAPES = [(48, 96), (100, 52), (52, 100), (96, 48)]  # of the pictures
BUCKETS = [WIDE, UPRIGHT, WIDE, UPRIGHT]
COLOURS = ("red", "green", "blue", "yellow")


def write_data(folder, seed: int):
    """Four pictures, two of each shape."""
    rng, rows = np.random.default_rng(seed), []
    for i, (height, width) in enumerate(SHAPES):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        mask = np.zeros((height, width), np.uint8)
        mask[8:40, 8:40] = 255
        small.resize((width, height)).save(folder / f"{i}.png")
        Image.fromarray(mask).save(folder / f"mask{i}.png")
        row = {
            "image": f"{i}.png",
            "mask": f"mask{i}.png",
            "instruction": f"Paint it {COLOURS[i]}.",
            "target": f"{i}.png",
        }
        rows.append(row | {"caption": f"It is {i}."})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), 0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def settings(data, cache, tmp_path_factory):
    held_out = write_data(tmp_path_factory.mktemp("held"), 1)
    return {
        "data__path": str(data), "data__cache": str(cache), "data__buckets": "kontext",
        "optimizer__learning_rate": 1e-3, "train__samples": str(held_out), "train__sample_every": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    """Four steps in one go: state, workdir, the size of each step's pictures, the programs made, and updates traced."""
    workdir, sizes, made, traces = tmp_path_factory.mktemp("straight"), [], {}, []
    with pytest.MonkeyPatch.context() as patch:
        prepare, init, update = Trainer.prepare, programs.Programs.__init__, programs.Programs._update

        def noted(self, options, *given):
            init(self, options, *given)
            made.setdefault(options.size, []).append(self)

        def prepared(self, batch):
            sizes.append(batch.mask.shape[1:])
            return prepare(self, batch)

        @functools.wraps(update)  # some arguments are static by name
        def traced(self, *given):
            traces.append(self.options.size)
            return update(self, *given)

        patch.setattr(Trainer, "prepare", prepared)
        patch.setattr(programs.Programs, "_update", traced)
        patch.setattr(programs.Programs, "__init__", noted)
        programs.shared_programs.cache_clear()
        state = train(small_run.make_config(**settings), workdir)
    return state, workdir, sizes, made, traces


@pytest.mark.slow
def test_steps_of_both_shapes_learn(straight):
    state, workdir, sizes, *_ = straight
    assert int(state.step) == len(sizes) == 4
    assert set(sizes[:2]) == set(sizes[2:]) == {WIDE, UPRIGHT}  # the test of resuming meets both before and after
    lines = small_run.metrics_without_times(workdir)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert np.isfinite(line["loss"])
        assert line["grad_norm"] > 0
    for name in ("colour", "preservation"):  # of the samples, which have both shapes too
        assert np.isfinite([lines[-1][f"samples/{name}"], lines[-1][f"samples_base/{name}"]]).all()


@pytest.mark.slow
def test_each_bucket_is_traced_once(straight):
    """Also those whose token counts are equal, which differ in nothing but the grid."""
    *_, made, traces = straight
    assert sorted(traces) == [WIDE, UPRIGHT]
    for size in (WIDE, UPRIGHT):
        (one,) = made[size]
        assert one.grid == (size[0] // 16, size[1] // 16)


@pytest.mark.slow
def test_two_and_two_steps_are_four(straight, settings, tmp_path):
    train(small_run.make_config(**settings, train__num_steps=2), tmp_path)
    state = train(small_run.make_config(**settings), tmp_path)
    leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(straight[0].params), strict=True)
    assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)
    assert small_run.metrics_without_times(tmp_path) == small_run.metrics_without_times(straight[1])


@pytest.mark.slow
def test_another_way_of_fitting_is_another_run(straight, settings, tmp_path):
    shutil.copytree(straight[1], tmp_path / "run")
    with pytest.raises(UserError, match="buckets"):
        train(small_run.make_config(**settings | {"data__buckets": "none", "train__num_steps": 6}), tmp_path / "run")


@pytest.mark.slow
def test_what_is_encoded_ahead_is_not_encoded_again(capsys, settings, tmp_path, monkeypatch):
    """Without the transformer's weights, and by a configuration whose mesh this machine lacks."""
    model = tmp_path / "model"
    shutil.copytree(small_run.model_folder(), model)
    for file in (model / "transformer").glob("*.safetensors*"):
        file.unlink()
    given = settings | {"data__cache": str(tmp_path / "cache")}
    config = small_run.config_file(tmp_path / "c.py", **given | {"model__path": str(model), "mesh__data": 2})
    argv = ("data", "encode", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    code, out, err = small_run.run_command(capsys, *argv)
    assert code == 0, err
    assert "2 of 96 x 48, 2 of 48 x 96 pixels" in out or "2 of 48 x 96, 2 of 96 x 48 pixels" in out
    assert re.search("encoded +8 in .* a second", out)  # the examples and the samples
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.safetensors")}
    assert len(written) == 8
    code, out, _ = small_run.run_command(capsys, *argv)
    assert (code, re.findall("encoded +0 in", out)) == (0, ["encoded      0 in"])

    def encode(*_):
        raise AssertionError("an encoder ran")

    monkeypatch.setattr(FluxKontextEditor, "encode_text", encode)
    monkeypatch.setattr(FluxKontextEditor, "encode_image", encode)
    train(small_run.make_config(**given, train__num_steps=1), tmp_path / "run")
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.safetensors")} == written


@pytest.mark.slow
def test_one_cache_serves_both_ways_of_fitting(data, straight, cache):
    editor = FluxKontextEditor(FluxKontext(small_run.model_folder()), EditorOptions("float32", 16))
    sources = [EncodedSource(EditFolder(data), editor, (64, 64), cache, buckets=kind) for kind in ("kontext", "none")]
    assert [row["pixels"].shape[:2] for row in map(sources[0].__getitem__, range(4))] == BUCKETS
    assert [row["pixels"].shape[:2] for row in map(sources[1].__getitem__, range(4))] == [(64, 64)] * 4
    assert {size: indices.tolist() for size, indices in sources[0].buckets.items()} == {WIDE: [0, 2], UPRIGHT: [1, 3]}
    assert sources[0].made == 0
    assert sources[1].made == 4


def test_a_value_that_is_no_kind_of_buckets_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match=r"data\.buckets"):
        train(small_run.make_config(**settings | {"data__buckets": "all"}), tmp_path)


@pytest.mark.slow
def test_a_lora_learns_from_triples_of_both_shapes(data, tmp_path, monkeypatch):
    shapes, grid = set(), FluxKontextEditor.grid

    def noted(self, height, width):
        shapes.add((height, width))
        return grid(self, height, width)

    monkeypatch.setattr(FluxKontextEditor, "grid", noted)
    config = sft_config()
    config.stage, config.batch.size, config.flow.picture_steps = "lora", 2, 2
    config.model.update(path=str(small_run.model_folder()), dtype="float32", max_text_tokens=16, remat="none")
    config.data.update(path=str(data), size=(64, 64), buckets="kontext")
    config.train.update(num_steps=2, save_every=2, image_every=2)
    train_supervised(config, tmp_path, jax.devices()[:1])
    lines = small_run.metrics_without_times(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert shapes >= {WIDE, UPRIGHT}


@pytest.mark.parametrize("stage", ["vae", "flow"])
def test_stages_that_bring_all_to_one_size_say_so(stage):
    config = sft_config()
    config.stage, config.data.buckets = stage, "kontext"
    with pytest.raises(UserError, match=r"data\.buckets: 'kontext' found"):
        validate_sft(config, 1)
