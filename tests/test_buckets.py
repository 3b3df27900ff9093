"""Aspect-ratio buckets: nothing is squeezed, each bucket compiles once, and a resumed run is the same bit for bit."""

import json
import re
import shutil

import numpy as np
import pytest
import small_run
from PIL import Image, ImageDraw
from test_resume import assert_bit_equal

from rcgrpo_jax.data.buckets import KONTEXT, NONE, make_buckets, window
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import KONTEXT_SIZES, resize_image, resize_mask
from rcgrpo_jax.editors.flux_kontext import FluxKontextEditor
from rcgrpo_jax.encoding.order import BatchOrder
from rcgrpo_jax.rl.programs import Programs
from rcgrpo_jax.rl.trainer import train
from rcgrpo_jax.runs.fields import flatten
from rcgrpo_jax.runs.metrics import read_metrics

BUCKETS = {"data__buckets": KONTEXT}
SHAPES = ((64, 64), (60, 72), (100, 50), (48, 96), (90, 45), (70, 70))  # height and width of six pictures


def make_example(height: int, width: int, circle: tuple[int, int, int]) -> EditExample:
    """A black picture with a white circle of (x, y, radius), which is the region."""
    picture = Image.new("L", (width, height))
    x, y, radius = circle
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    levels = np.asarray(picture)
    return EditExample("circle", np.stack([levels] * 3, -1), levels.astype(np.float32) / 255, "Do it.")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six examples of four shapes, each with a target."""
    folder, rng, lines = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0), []
    for i, (height, width) in enumerate(SHAPES):
        mask = np.zeros((height, width), np.uint8)
        mask[8 : height // 2, 8 : width // 2] = 255
        for kind in ("image", "target"):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
            small.resize((width, height)).save(folder / f"{kind}{i}.png")
        Image.fromarray(mask).save(folder / f"mask{i}.png")
        line = {"image": f"image{i}.png", "mask": f"mask{i}.png", "target": f"target{i}.png"}
        lines.append(json.dumps(line | {"instruction": f"Paint box {i} red."}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def make_config(data, **changes):
    return small_run.make_config(**BUCKETS, data__path=str(data), optimizer__learning_rate=1e-3, **changes)


# Sizes and crops


def test_without_buckets_all_pictures_take_one_size_whole():
    fitted = make_buckets(NONE, (64, 64)).fit(make_example(50, 100, (30, 25, 10)))
    assert (fitted.size, fitted.cut, fitted.lost) == ((64, 64), 0, 0)
    assert fitted.example.image.shape == (50, 100, 3)


def test_the_sizes_are_kontexts_scaled_to_the_area():
    assert make_buckets(KONTEXT, (1024, 1024)).sizes == tuple((height, width) for width, height in KONTEXT_SIZES)
    for side in (64, 128, 512):
        sizes = make_buckets(KONTEXT, (side, side)).sizes
        assert (side, side) in sizes
        assert len(set(sizes)) == len(sizes)
        assert all(height % 16 == width % 16 == 0 for height, width in sizes)
        assert all(0.8 < height * width / side**2 < 1.2 for height, width in sizes)


@pytest.mark.parametrize(("height", "width"), [(200, 200), (200, 330), (331, 200), (1000, 200), (200, 901)])
def test_a_circle_stays_a_circle(height, width):
    fitted = make_buckets(KONTEXT, (256, 256)).fit(make_example(height, width, (width // 2, height // 2, 60)))
    image = resize_image(fitted.example.image, fitted.size)[..., 0] > 127
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    assert fitted.lost == 0
    assert abs((rows[-1] - rows[0]) - (columns[-1] - columns[0])) <= 2
    region = resize_mask(fitted.example.mask, fitted.size) > 0.5
    assert (region != image).sum() < 0.03 * image.sum()  # the mask goes with it


def test_the_crop_is_in_the_middle_unless_that_cuts_the_region():
    size = (64, 64)
    rows, columns = window(make_example(64, 128, (64, 32, 20)).mask, size)
    assert (rows, columns) == (slice(0, 64), slice(32, 96))
    _, columns = window(make_example(64, 128, (22, 32, 20)).mask, size)
    assert columns == slice(2, 66)  # the first that holds all of it, seen from the middle
    _, columns = window(np.ones((64, 128), np.float32), size)
    assert columns == slice(32, 96)


def test_a_region_that_is_too_wide_is_kept_as_far_as_it_goes_and_told():
    example = make_example(64, 640, (300, 32, 10))
    example.mask[28:36, 100:500] = 1
    fitted = make_buckets(KONTEXT, (64, 64)).fit(example)
    assert fitted.size == (48, 96)
    assert fitted.cut == pytest.approx(1 - 128 / 640)
    kept = example.mask[fitted.window]
    assert fitted.lost == pytest.approx(1 - kept.sum() / example.mask.sum(), abs=1e-3)
    assert 0 < fitted.lost < 1


# Order


def test_the_order_of_batches_is_a_function_of_step_seed_and_counts_alone():
    order = BatchOrder((50, 7, 3), 4, 1)
    whole = [order[step] for step in range(1000)]
    assert [BatchOrder((50, 7, 3), 4, 1)[step] for step in (999, 0, 300)] == [whole[999], whole[0], whole[300]]
    assert whole != [BatchOrder((50, 7, 3), 4, 2)[step] for step in range(1000)]
    for bucket, count in enumerate((50, 7, 3)):
        numbers = [number for found, number in whole if found == bucket]
        assert numbers == [*range(len(numbers))]
        epochs = 1000 * 4 / 60
        assert abs(len(numbers) - epochs * count / 4) <= 1


def test_one_bucket_gives_its_batches_in_turn():
    order = BatchOrder((10,), 4, 0)
    assert [order[step] for step in range(600)] == [(0, step) for step in range(600)]


# Runs


def test_a_run_compiles_each_bucket_once_and_two_and_two_steps_are_four(data, tmp_path, monkeypatch):
    made, init = [], Programs.__init__

    def count(self, options, *where):
        made.append(options.size)
        init(self, options, *where)

    monkeypatch.setattr(Programs, "__init__", count)
    shared = {"train__save_every": 3, "data__cache": str(tmp_path / "cache")}
    straight = train(make_config(data, **shared, train__num_steps=6), tmp_path / "straight")
    assert len(made) == len(set(made))
    assert set(made) > {(64, 64)}  # of other shapes, too
    train(make_config(data, **shared, train__num_steps=3), tmp_path / "run")
    resumed = train(make_config(data, **shared, train__num_steps=6), tmp_path / "run")
    assert_bit_equal(resumed, straight)
    assert small_run.metrics_without_times(tmp_path / "run") == small_run.metrics_without_times(tmp_path / "straight")
    assert len(made) == len(set(made))


@pytest.mark.slow
def test_samples_of_several_shapes_are_compared_side_by_side(data, tmp_path):
    config = make_config(data, train__num_steps=1, train__samples=str(data), train__sample_every=1)
    config.data.path = str(small_run.data_folder())
    train(config, tmp_path)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")[-1:]
    assert all(np.isfinite(line[f"samples/{name}"]) for name in ("preservation", "colour"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_sft_takes_buckets_for_a_lora_and_for_nothing_else(data, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        "from rcgrpo_jax.sft.config import default_config\ndef get_config():\n    config = default_config()\n"
        f"    config.model.path = {str(small_run.model_folder())!r}\n    config.model.dtype = 'float32'\n"
        f"    config.data.path, config.data.size, config.data.buckets = {str(data)!r}, (64, 64), 'kontext'\n"
        "    config.stage, config.batch.size, config.train.num_steps = 'lora', 2, 2\n"
        "    config.model.max_text_tokens = 16\n    config.mesh.fsdp = 1\n    return config\n"
    )
    code, _, err = small_run.run_command(capsys, "sft", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert code == 0, err
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    argv = ["sft", f"--config={file}", f"--workdir={tmp_path / 'vae'}", "--config.stage=vae"]
    code, problem, _ = small_run.fail(capsys, *argv)
    assert code == 2
    assert "data.buckets: 'kontext' found; stage vae brings all to one size: none" in problem


# Commands


def test_what_was_encoded_ahead_is_not_encoded_by_the_run(data, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(small_run.model_folder(), tmp_path / "model")
    for file in (model / "transformer").glob("*.safetensors"):
        file.unlink()  # nobody encodes with it
    fields = flatten(make_config(data).to_dict())
    text = f"    config.update_from_flattened_dict({fields!r})\n    return config\n"
    text = f"from rcgrpo_jax.rl.config import default_config\ndef get_config():\n    config = default_config()\n{text}"
    (tmp_path / "config.py").write_text(text)
    flags = [
        f"--config={tmp_path / 'config.py'}",
        f"--config.data.cache={tmp_path / 'cache'}",
        f"--workdir={tmp_path / 'run'}",
    ]
    code, out, err = small_run.run_command(capsys, "data", "encode", *flags, f"--config.model.path={model}")
    assert code == 0, err
    assert "encoded      6 in" in out
    code, again, _ = small_run.run_command(capsys, "data", "encode", *flags, f"--config.model.path={model}")
    assert "encoded      0 in" in again
    monkeypatch.setattr(FluxKontextEditor, "load_encoders", lambda self: pytest.fail("the encoders were loaded"))
    train(make_config(data, data__cache=str(tmp_path / "cache"), train__num_steps=1), tmp_path / "run")


def test_a_preview_counts_and_draws_the_buckets(data, tmp_path, capsys):
    out = tmp_path / "preview.png"
    code, text, _ = small_run.run_command(capsys, "data", "preview", f"--data={data}", "--size=64x64", f"--out={out}")
    assert code == 0
    rows = {
        tuple(line.split()[:3:2]): int(line.split()[3]) for line in text.splitlines() if re.match(r" *\d+ x ", line)
    }
    assert sum(rows.values()) == len(SHAPES)
    assert rows["48", "96"] == 2
    assert Image.open(out).width > 100
