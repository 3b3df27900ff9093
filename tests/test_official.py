"""The group `official` is what CompBench's script computes, and `region` is what its measures mean."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
from official_compbench import MEASURES, OfficialScript, squeezenet, torch_lpips, trunk_weights
from PIL import Image
from references import torch, transformers
from safetensors.numpy import load_file, save_file
from skimage import data
from tiny_clip import SIDE, write_clip

from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.images import read_image
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.examples import EditedBatch, ExampleBatch
from rcgrpo_jax.evaluation.measure import measure
from rcgrpo_jax.evaluation.measures import REGISTERED, Measure, MeasureInputs, MeasureOptions, base, choose, region
from rcgrpo_jax.evaluation.measures.clip import official_box, processed, region_vectors
from rcgrpo_jax.evaluation.measures.official import CAP as OFFICIAL_CAP
from rcgrpo_jax.evaluation.measures.psnr import CAP
from rcgrpo_jax.evaluation.measures.region import WIDENED, binarise, outside
from rcgrpo_jax.evaluation.official import official_batch
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.evaluation.tables import make_tables, notes
from rcgrpo_jax.models.lpips import NETWORKS, lpips
from rcgrpo_jax.weights.clip import load_clip
from rcgrpo_jax.weights.lpips import load_lpips, load_squeeze

region_psnr, region_ssim, region_lpips, region_change = (
    jax.jit(getattr(region, f"region_{name}")) for name in ("psnr", "ssim", "lpips", "change")
)
distance = jax.jit(lpips, static_argnums=3)
LONG = "snow on a red cup and blue water " * 20


@pytest.fixture(scope="module")
def squeeze_file(tmp_path_factory) -> Path:
    """A random trunk and the real heads, converted by the lines that docs/compbench.md gives to users."""
    folder = tmp_path_factory.mktemp("squeeze")
    torch.save(trunk_weights(squeezenet()), folder / "squeezenet1_1-b8a52dc0.pth")
    text = (small_run.ROOT / "docs" / "compbench.md").read_text()
    (script,) = (x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "squeeze" in x)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(script, {})
    return folder / "squeeze.safetensors"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def options(clip_folder, squeeze_file) -> MeasureOptions:
    return MeasureOptions(str(clip_folder), str(squeeze_file))


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """A folder of examples, with edits in `edits/`: what is usual, and what the script treats in its own way."""
    folder, rng = tmp_path_factory.mktemp("examples"), np.random.default_rng(0)
    lines = []
    for i, (caption, box) in enumerate([
        ("a red cup", (30, 50, 90, 140)),
        (LONG, (20, 20, 60, 62)),
        (None, (5, 70, 100, 90)),
        ("a plate", (40, 40, 41, 90)),  # one row, or a few at 512 x 512
        ("a spoon", (60, 10, 110, 60)),
    ]):  # fmt: skip
        photo = np.ascontiguousarray(data.coffee()[60 * i : 60 * i + 120, 40 : 40 + 160])
        mask = np.zeros((120, 160), np.uint8)
        mask[box[0] : box[2], box[1] : box[3]] = 255
        mask[box[0] : box[2], box[1]] = 77  # a soft edge
        target = np.where(mask[..., None] > 0, 255 - photo, photo)
        noise = 12 * rng.standard_normal(photo.shape)
        edited = np.where(mask[..., None] > 0, np.roll(target, 3, 1), photo + (0 if i == 4 else noise))
        pictures = {"image": photo, "target": target, "edits": edited.clip(0, 255).astype(np.uint8)}
        line = {"instruction": "Change it."} | ({"caption": caption} if caption else {})
        for kind, picture in {**pictures, "mask": mask}.items():
            name = f"{kind}/{i + 1:05d}-{i}.png" if kind == "edits" else f"{kind}/{i}.png"
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / name)
            if kind != "edits" and not (kind == "target" and i == 1):
                line[kind] = name
        lines.append(line)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def measure_at(side: int, examples: Path, options: MeasureOptions) -> Evaluation:
    """Both groups, `official` at another size than 512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rcgrpo_jax.evaluation.measure.official_batch", partial(official_batch, side=side))
        names = ["official", "region"]
        return measure(examples / "edits", EditFolder(examples), measures=names, batch=2, options=options)


@pytest.fixture(scope="module")
def found(examples, options) -> Evaluation:
    return measure_at(112, examples, options)


# The script


@pytest.mark.filterwarnings("ignore:Encountered caption longer")  # torchmetrics cuts it too, and says so
@pytest.mark.parametrize("side", [112, pytest.param(512, marks=pytest.mark.slow)])
def test_official_measures_are_those_of_the_script(examples, options, found, side):
    found = found if side == 112 else measure_at(side, examples, options)
    script = OfficialScript(options.clip, squeezenet(), side)
    source = EditFolder(examples)
    for i, line in enumerate(map(json.loads, (examples / "metadata.jsonl").read_text().splitlines())):
        target = examples / line["target"] if "target" in line else None
        theirs = script.measure(
            examples / line["image"], examples / "edits" / f"{source[i].name}.png", examples / line["mask"], target,
            line.get("caption"),
        )  # fmt: skip
        for name in MEASURES:
            ours = found.measures[f"official_{name}"][i]
            wanted = OFFICIAL_CAP if np.isinf(theirs[name]) else theirs[name]
            tolerance = dict(rtol=1e-3, atol=1e-6) if name == "lpips" else dict(rtol=1e-6, atol=1e-4)
            np.testing.assert_allclose(ours, wanted, **tolerance, err_msg=f"{name} of {i}")
    values = np.array([found.measures[f"official_{name}"] for name in MEASURES])
    assert np.isnan(values).sum() == 1  # LC-I of the one without a target
    assert (np.nanstd(values, axis=1) > [1e-3, 1, 1, 1e-2, 1e-4]).all()


def test_what_could_not_be_measured_is_counted(found, tmp_path):
    lines = notes(found)
    assert any("official LC-I is not measured of 1 of 5 edits" in line for line in lines)
    assert any("region LC-T is not measured of 1 of 5 edits" in line and "caption" in line for line in lines)
    assert any(line.startswith("1 of 5 examples have no caption: official LC-T") for line in lines)
    assert not any("edit success" in line or line.startswith("ACD") for line in lines)  # of another group
    found.save(tmp_path / "a.npz")
    read = Evaluation.load(tmp_path / "a.npz")
    assert notes(read) == lines
    header, row = make_tables({"edits": [read]})[0].lines
    cell = row[header.index("official LC-I ↑")]
    mean = np.nanmean(found.measures["official_lc_i"])
    assert cell.startswith(f"{mean:.3f} [")
    lost = replace(found, measures=found.measures | {"official_lc_i": np.full(5, np.nan, np.float32)})
    (table, differences) = make_tables({"edits": [read], "others": [lost]})
    assert table.lines[2][header.index("official LC-I ↑")] == "-"
    assert differences.lines[1][1] == "-"


def test_equal_backgrounds_have_a_number_and_a_note():
    photo = data.coffee()[:64, :64]
    mask = np.zeros((64, 64), np.float32)
    mask[20:40, 20:40] = 1
    edited = np.where(mask[..., None] > 0, 255 - photo, photo)
    source = [EditExample("a", photo, mask, "Invert it.")]
    values = measure(edited[None], source, measures=["official_psnr", "region_psnr"])
    assert values.measures["official_psnr"][0] < OFFICIAL_CAP  # resampling carries the edit over the border
    assert values.measures["region_psnr"][0] == CAP
    equal = measure(photo[None], source, measures=["official_psnr"])
    assert equal.measures["official_psnr"][0] == OFFICIAL_CAP
    assert any("infinity" in line for line in notes(equal))


@pytest.mark.parametrize(
    ("net", "size"), [("alex", 64), ("vgg", 32), ("squeeze", 64), ("squeeze", 61), ("squeeze", 17)]
)
def test_lpips_of_every_network_is_that_of_torchmetrics(squeeze_file, net, size):
    rng = np.random.default_rng(0)
    a = rng.random((2, size, size, 3), np.float32)
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape, np.float32), 0, 1)
    weights = load_squeeze(squeeze_file) if net == "squeeze" else load_lpips(net)
    features = squeezenet() if net == "squeeze" else plain_trunk(net, weights)
    with torch.no_grad():
        tensors = (torch.tensor(2 * x - 1).permute(0, 3, 1, 2) for x in (a, b))
        theirs = torch_lpips(net, features)(*tensors).flatten().numpy()
    np.testing.assert_allclose(distance(weights, a, b, net), theirs, atol=1e-4, rtol=1e-4)
    assert theirs.min() > 0.01


def plain_trunk(net: str, weights) -> "torch.nn.Sequential":
    """AlexNet or VGG16 as torchvision numbers them, with the weights of ours."""
    modules = []
    for layer, step in zip(weights, NETWORKS[net].steps, strict=True):
        if step.pool:
            modules.append(torch.nn.MaxPool2d(step.pool, 2))
        height, _, inputs, outputs = step.kernel
        convolution = torch.nn.Conv2d(inputs, outputs, height, step.stride, step.padding)
        convolution.weight.data = torch.tensor(layer.kernel).permute(3, 2, 0, 1)
        convolution.bias.data = torch.tensor(layer.bias).flatten()
        modules += [convolution, torch.nn.ReLU()]
    return torch.nn.Sequential(*modules, torch.nn.Identity())  # torchvision pools at the end, and nothing sees it


@pytest.mark.parametrize("size", [(40, 40), (21, 77), (90, 31), (1, 4), (30, 30)])
def test_crops_are_prepared_as_the_processor_does(size):
    picture = np.asarray(Image.fromarray(data.coffee()).resize(size[::-1]))
    crop = {"height": SIDE, "width": SIDE}
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop)
    wanted = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(processed(picture, SIDE), wanted, atol=1e-6)


def test_the_scripts_crop_loses_its_last_row_and_column():
    mask = np.zeros((20, 30), np.float32)
    mask[4:9, 7:15] = 0.1
    assert official_box(mask) == (slice(4, 8), slice(7, 14))
    mask[5:] = 0
    assert official_box(mask) is None  # one row
    assert official_box(np.zeros((20, 30), np.float32)) is None


# The corrected variants


def batch(change=None, drift=0.0) -> MeasureInputs:
    """A photograph with a region, `change` in place of the latter, `drift` added outside of it and its border."""
    source = np.float32(data.coffee()[None, :64, :80]) / 255 * 0.8
    mask = np.zeros((1, 64, 80), np.float32)
    mask[:, 16:40, 20:50] = 1
    far = np.asarray(outside(mask))[..., None] > 0
    edited = np.where(far, source + np.float32(drift), source)
    return MeasureInputs(source, edited if change is None else np.where(far, edited, np.float32(change)), mask)


def test_a_change_in_the_region_and_its_border_is_none_of_the_background(squeeze_file):
    inputs, weights = batch(change=0.9), load_squeeze(squeeze_file)
    assert region_psnr(inputs) == CAP
    np.testing.assert_allclose(region_ssim(inputs), 1, atol=1e-6)
    np.testing.assert_allclose(region_lpips(inputs, weights), 0, atol=1e-7)
    assert region_change(inputs) > 0.9
    assert region_change(batch()) == 0


def test_a_region_that_is_lost_when_it_is_measured_has_no_value_and_is_not_the_whole_picture(options):
    inputs = batch(drift=0.1)._replace(mask=np.zeros((1, 64, 80), np.float32))
    for measured in (region_psnr, region_ssim, region_change):
        assert np.isnan(measured(inputs))
    picture = np.uint8(255 * inputs.source[0])
    example = EditExample("a", picture, inputs.mask[0], "Change it.", caption="a cup", target=picture)
    edited = EditedBatch(ExampleBatch((example,), np.array([0]), 1), picture[None], None)
    vectors = region_vectors(binarise, load_clip(options.clip), edited)
    assert np.isnan(vectors.edited).all()


def test_the_background_is_what_lies_beyond_the_border():
    shown = np.asarray(outside(batch().mask))[0]
    assert shown[16 - WIDENED - 1, 30] == shown[30, 50 + WIDENED] == 1
    assert shown[16 - WIDENED, 30] == shown[30, 50 + WIDENED - 1] == 0
    soft = 0.8 * batch().mask
    soft[0, 10:16, 20:50] = 0.3  # less than half of the largest
    np.testing.assert_array_equal(outside(soft)[0], shown)


def test_the_background_counts_per_pixel_of_it(squeeze_file):
    np.testing.assert_allclose(region_psnr(batch(drift=0.1)), 20, atol=1e-3)  # official: 22 and more, by the region
    np.testing.assert_allclose(region_psnr(batch(change=0.0, drift=0.1)), 20, atol=1e-3)
    weights, inputs = load_squeeze(squeeze_file), batch(drift=0.1)
    share = np.mean(outside(inputs.mask))
    whole = distance(weights, inputs.source, inputs.edited, "squeeze")
    np.testing.assert_allclose(region_lpips(inputs, weights), whole / share, rtol=1e-4)
    assert 0.5 < region_ssim(inputs)[0] < 0.9999


def test_without_a_background_there_is_no_value(squeeze_file):
    inputs = batch()._replace(mask=np.ones((1, 64, 80), np.float32))
    values = (region_psnr(inputs), region_ssim(inputs), region_lpips(inputs, load_squeeze(squeeze_file)))
    assert np.isnan(values).all()


def test_local_clip_of_the_target_is_1_in_either_form(examples, options):
    source = [EditFolder(examples)[i] for i in (0, 1, 2)]
    targets = np.stack([read_image(examples / "target" / f"{i}.png") for i in (0, 1, 2)])
    for name in ("region_lc_i", "official_lc_i"):
        values = measure(targets, source, measures=[name], options=options, batch=3).measures[name]
        np.testing.assert_allclose(values, [1, np.nan, 1], atol=1e-5)


def test_a_caption_that_is_too_long_loses_its_end_in_the_script_alone(examples, options):
    example, folder = EditFolder(examples)[0], load_clip(options.clip)

    def caption(name: str, text: str) -> np.ndarray:
        batch = ExampleBatch((replace(example, caption=text),), np.array([0]), 1)
        return np.asarray(REGISTERED[name].prepare(folder, EditedBatch(batch, example.image[None], None)).caption[0])

    texts = (LONG, f"another beginning, {LONG}", "short")
    official, corrected = ([caption(f"{group}_lc_t", text) for text in texts] for group in ("official", "region"))
    np.testing.assert_allclose(official[0], official[1], atol=1e-6)
    assert np.abs(corrected[0] - corrected[1]).max() > 1e-3
    np.testing.assert_allclose(official[2], corrected[2], atol=1e-6)


def test_measures_that_prepare_the_same_share_it(monkeypatch):
    calls = []
    monkeypatch.setattr(base, "_MEASURES", dict(base._MEASURES))
    one = Measure(
        "one", "one", 1, "↑", lambda inputs, x: x, load=lambda options: 3.0, group="single",
        prepare=lambda loaded, edited: calls.append(loaded) or np.full(1, loaded, np.float32),
    )  # fmt: skip
    base.register(one)
    base.register(one._replace(name="two"))
    photo = data.coffee()[:32, :32]
    source = [EditExample("a", photo, np.ones((32, 32), np.float32), "Invert it.")]
    values = measure(photo[None], source, measures=["one", "two"]).measures
    assert (values["one"], values["two"], calls) == (3, 3, [3.0])


# Groups, options and files


def test_groups_are_chosen_by_name_and_nothing_by_default_but_the_editors():
    assert [one.name for one in choose(None)] == ["success", "caption", "psnr", "ssim", "lpips", "overall", "acd"]
    assert [one.name for one in choose(["region_change", "official"])] == [
        *(f"official_{name}" for name in MEASURES), "region_change",
    ]  # fmt: skip
    assert [REGISTERED[f"region_{name}"].header for name in MEASURES] == ["LC-I", "LC-T", "PSNR", "SSIM", "LPIPS"]
    with pytest.raises(UsageError, match="'oficial' found") as error:
        choose(["oficial"])
    assert "'official'" in error.value.remedy
    with pytest.raises(UsageError, match="measures: '' found"):
        choose([])


@pytest.mark.parametrize(("names", "remedy"), [
    (["official_lc_t"], "--clip FOLDER"), (["region"], "--clip FOLDER"), (["region_lpips"], "docs/compbench.md"),
])  # fmt: skip
def test_weights_that_were_asked_for_and_are_not_given_are_an_error(examples, names, remedy):
    with pytest.raises(UserError, match=f"measures: {names[0]}.*: its weights were not found") as error:
        measure(examples / "edits", EditFolder(examples), measures=names)
    assert remedy in error.value.remedy
    assert len(str(error.value).splitlines()) == 2


def test_a_file_that_is_not_squeezenets_is_refused(squeeze_file, tmp_path):
    tensors = load_file(squeeze_file)

    def refusal(name: str, **changed) -> str:
        save_file({k: v for k, v in {**tensors, **changed}.items() if v is not None}, tmp_path / name)
        with pytest.raises(UserError) as error:
            load_squeeze(tmp_path / name)
        assert "docs/compbench.md" in error.value.remedy
        return error.value.problem

    assert "missing lin6.model.1.weight" in refusal("a.safetensors", **{"lin6.model.1.weight": None})
    assert "found [3], wanted [64]" in refusal("b.safetensors", **{"features.0.bias": np.zeros(3, np.float32)})
    assert "NaN or infinity" in refusal("c.safetensors", **{"features.0.bias": np.full(64, np.nan, np.float32)})
    for name, problem in (("none.safetensors", "no such file"), ("trunk.pth", "pickle")):
        if name.endswith("pth"):
            torch.save(trunk_weights(squeezenet()), tmp_path / name)
        with pytest.raises(UserError, match=problem) as error:
            load_squeeze(tmp_path / name)
        assert len(str(error.value).splitlines()) == 2


def test_the_command_measures_groups(examples, options, tmp_path, capsys):
    argv = [f"--pictures={examples / 'edits'}", f"--data={examples}", f"--out={tmp_path / 'out'}"]
    command.run([*argv, "--measures=official,region_change", f"--clip={options.clip}",
                 f"--lpips_squeeze={options.lpips_squeeze}"])  # fmt: skip
    printed = capsys.readouterr().out
    for header in ("LC-I ↑", "LC-T ↑", "PSNR ↑", "SSIM ↑", "LPIPS ↓"):
        assert f"official {header}" in printed
    assert "edit success" not in printed
    with pytest.raises(UserError, match="measures: official_lpips: its weights were not found"):
        command.run([*argv, "--measures=official_lpips"])
