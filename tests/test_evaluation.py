"""An evaluation measures what it says, of the edits a user would get, and puts models side by side fairly."""

import importlib.util
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import torch
from jax.sharding import Mesh
from skimage.metrics import structural_similarity
from torch.nn import functional as F

from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.data.scenes import Scenes
from rcgrpo_jax.data.shapes import COLOURS, SHAPES, render
from rcgrpo_jax.editor import Editor
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.caption import caption_scores, read_region
from rcgrpo_jax.evaluation.evaluate import Evaluation, evaluate
from rcgrpo_jax.evaluation.lpips import MISSING, load_weights, lpips
from rcgrpo_jax.evaluation.metrics import PSNR_CAP, background_scores, edit_scores
from rcgrpo_jax.evaluation.tables import Column, make_tables, markdown, plain
from rcgrpo_jax.method import concentration, region
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter
from rcgrpo_jax.models.mmdit import AttentionOptions, Condition, sown_masses
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.parallel.sharding import parameter_sharding
from rcgrpo_jax.weights.export import save_lora
from rcgrpo_jax.weights.load import ModelFolder

pytestmark = pytest.mark.usefixtures("quick_compilation")

COUNT, SIZE, STEPS, BATCH = 3, 64, 2, 2
TASKS = 30


@cache
def editor(devices: int = 1) -> Editor:
    return Editor(ModelFolder(small_run.model_folder()), jnp.float32, 16, parameter_sharding(mesh(devices)))


def mesh(devices: int = 1) -> Mesh:
    return make_mesh({"fsdp": -1}, jax.devices()[:devices])


@cache
def scenes() -> Scenes:
    return Scenes("heldout", COUNT, SIZE)


@cache
def adapter() -> dict:
    """A LoRA that changes the edits."""
    fresh = init_adapter(jax.random.key(0), editor().transformer_params, LoRAConfig(4, 8.0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh))))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh)


def run(source=None, indices=range(COUNT), model=None, **options) -> Evaluation:
    return evaluate(model or editor(), source or scenes(), indices, **{"num_steps": STEPS, "batch": BATCH, **options})


@cache
def base() -> Evaluation:
    return run()


def pictures(seed: int = 0, count: int = 3, size: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two batches of pictures, not too different, and a mask."""
    rng = np.random.default_rng(seed)
    a = rng.random((count, size, size, 3), np.float32)
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape, np.float32), 0, 1)
    mask = np.zeros((count, size, size), np.float32)
    mask[:, 10:30, 5:25] = 1
    return a, b, mask


# Metrics


def test_edit_scores_are_full_for_the_target_and_none_for_the_source():
    examples = [scenes()[i] for i in range(COUNT)]
    source, target = (np.stack([getattr(x, f) for x in examples]) / np.float32(255) for f in ("image", "target"))
    mask = np.stack([x.mask for x in examples])
    right, untouched = (edit_scores(source, edited, mask, target) for edited in (target, source))
    np.testing.assert_allclose(right["success"], 1, atol=1e-3)
    np.testing.assert_allclose(right["overall"], 1, atol=0.02)
    np.testing.assert_allclose(untouched["success"], 0, atol=1e-3)


def test_psnr_is_of_the_whole_frame_without_the_edit():
    a, _, mask = pictures()
    outside = 1 - 400 / 48**2
    psnr = background_scores(a, a + 0.1, mask, None)["psnr"]
    np.testing.assert_allclose(psnr, -10 * np.log10(0.01 * outside), rtol=1e-5)


def test_the_background_does_not_see_the_edit():
    a, b, mask = pictures()
    edited = np.where(mask[..., None] > 0, b, a)
    scores = background_scores(a, edited, mask, load_weights())
    np.testing.assert_array_equal(scores["psnr"], PSNR_CAP)
    np.testing.assert_allclose(scores["ssim"], 1, atol=1e-6)
    np.testing.assert_allclose(scores["lpips"], 0, atol=1e-6)


def test_ssim_is_that_of_skimage():
    a, b, mask = pictures()
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, full=True)
    shown = 1 - mask[..., None]
    maps = [
        structural_similarity(x, y, channel_axis=-1, **options)[1] for x, y in zip(a * shown, b * shown, strict=True)
    ]
    inner = [x[5:-5, 5:-5].mean() for x in maps]  # where the window lies in the picture
    np.testing.assert_allclose(background_scores(a, b, mask, None)["ssim"], inner, atol=1e-5)


@pytest.mark.parametrize("size", [31, 64, 97])
def test_lpips_is_that_of_torch(size):
    """AlexNet as torch lays it out, the heads as 1 x 1 convolutions: the published definition, on the same weights."""
    weights = load_weights()
    a, b, _ = pictures(size=size)

    def features(x: np.ndarray) -> list[torch.Tensor]:
        x = torch.from_numpy(x).permute(0, 3, 1, 2) * 2 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        found = []
        for i, layer in enumerate(weights):
            kernel, bias = torch.from_numpy(layer.kernel).permute(3, 2, 0, 1), torch.from_numpy(layer.bias).flatten()
            x = F.max_pool2d(x, 3, 2) if i in (1, 2) else x
            x = F.relu(F.conv2d(x, kernel, bias, stride=4 if i == 0 else 1, padding=(2, 2, 1, 1, 1)[i]))
            found.append(F.normalize(x, dim=1, eps=1e-10))
        return found

    heads = [torch.from_numpy(layer.head).permute(0, 3, 1, 2) for layer in weights]
    layers = zip(heads, features(a), features(b), strict=True)
    theirs = sum((head * (x - y) ** 2).sum(1).mean((1, 2)) for head, x, y in layers)
    np.testing.assert_allclose(jax.jit(lpips)(weights, a, b), theirs, rtol=1e-4)
    assert theirs.min() > 0.01


# Captions


@cache
def tasks(split: str) -> Scenes:
    return Scenes(split, TASKS, 128 if split == "heldout" else 96)


@cache
def regions_of(source: Scenes):
    return jax.tree.map(lambda *x: np.stack(x), *(read_region(source, i) for i in range(len(source))))


# Before a photograph another answer can look nearly like the right one; that it is the best stays true.
@pytest.mark.parametrize(("split", "least"), [("heldout", 0.95), ("photo", 0.75)])
def test_a_caption_is_read_off_the_right_result_alone(split, least):
    source, regions = tasks(split), regions_of(tasks(split))
    target, image = (np.stack([getattr(source[i], f) for i in range(TASKS)]) for f in ("target", "image"))
    right = caption_scores(target / np.float32(255), regions)
    assert right.min() > least
    assert np.median(right) > 0.99
    untouched = caption_scores(image / np.float32(255), regions)
    assert untouched.max() < 0.05
    half = caption_scores((0.5 * target + 0.5 * image).astype(np.float32) / 255, regions)
    assert 0.1 < half.mean() < 0.6


def test_a_caption_is_about_the_region_alone():
    source = tasks("heldout")
    regions = regions_of(source)
    target = np.stack([source[i].target for i in range(TASKS)]) / np.float32(255)
    boxes = np.zeros(target.shape[:3], bool)
    for box, (row, column), small in zip(boxes, regions.corner, regions.box, strict=True):
        box[row : row + 64, column : column + 64] = small
        assert small.any()
    elsewhere = np.where(boxes[..., None], target, np.random.default_rng(0).random(target.shape, np.float32))
    np.testing.assert_allclose(caption_scores(elsewhere, regions), caption_scores(target, regions), atol=1e-6)
    for i in range(TASKS):  # the box is that of the whole mask
        rows, columns = np.nonzero(source[i].mask)
        assert [x.min() for x in np.nonzero(boxes[i])] == [rows.min(), columns.min()]
        assert [x.max() for x in np.nonzero(boxes[i])] == [rows.max(), columns.max()]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_colours_are_mixed_as_they_are_drawn(index):
    """Every answer is the right one for a picture that shows it."""
    source = tasks("heldout")
    scene, one = source.scene(index), read_region(source, index)
    thing, background = scene.new or scene.old, source.background(index)
    answers = [None, *(replace(thing, shape=shape, colour=colour) for shape in SHAPES for colour in COLOURS)]
    shown = np.stack([render(replace(scene, new=new).after, background) for new in answers]) / np.float32(255)
    asked = np.arange(len(answers))
    regions = jax.tree.map(lambda x: np.broadcast_to(x, (len(answers), *np.shape(x))), one)._replace(asked=asked)
    assert caption_scores(shown, regions).min() > 0.5
    assert source[index].caption == ("a " + " ".join([thing.size, thing.colour, thing.shape])) or scene.new is None
    assert one.asked == (0 if scene.new is None else answers.index(scene.new))


# Evaluations


def test_edits_are_those_of_the_editor_from_noise_of_seed_and_index():
    indices = [2, 1]
    found = run(indices=indices, seed=7)
    examples = [scenes()[i] for i in indices]
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(jax.random.key(7), i), (16, 64)) for i in indices])
    pixels = np.stack([x.image for x in examples])
    edited = editor().edit(pixels, [x.instruction for x in examples], noise, STEPS)
    np.testing.assert_allclose(found.images.astype(int), edited.astype(int), atol=1)
    assert found.names == tuple(x.name for x in examples)
    assert found.kinds == ("replace", "remove")
    other = run(indices=indices, seed=8)
    assert (other.images != found.images).mean() > 0.5


def test_measures_one_value_of_everything_for_every_example():
    names = {"success", "overall", "psnr", "ssim", "lpips", "caption", "acd"}
    assert set(base().measures) == names
    assert base().images.shape == (COUNT, SIZE, SIZE, 3)
    for values in base().measures.values():
        assert values.shape == (COUNT,)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


def test_batches_and_devices_change_nothing():
    calls = []
    spread = run(model=editor(2), mesh=mesh(2), batch=3, progress=lambda: calls.append(None))  # one row is padding
    assert len(calls) == COUNT
    np.testing.assert_allclose(spread.images.astype(int), base().images.astype(int), atol=1)
    for name, values in base().measures.items():
        np.testing.assert_allclose(spread.measures[name], values, atol=0.02, rtol=0.01, err_msg=name)


def test_a_lora_edits_from_the_same_noise():
    zero = jax.tree.map(jnp.zeros_like, adapter())
    np.testing.assert_allclose(run(lora=zero).images.astype(int), base().images.astype(int), atol=1)
    assert (run(lora=adapter()).images != base().images).mean() > 0.1


def test_acd_is_the_density_of_the_attention_map():
    model, example = editor(), scenes()[0]
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (16, 64))
    text = model.encode_text([example.instruction] * BATCH)
    reference = model.encode_image(np.stack([example.image] * BATCH))
    condition = Condition(text.text[0], text.pooled[0], reference[0], jnp.float32(2.5))
    tokens = region.token_mask(jnp.asarray(example.mask), (4, 4))
    with_map = model.transformer.clone(attention=AttentionOptions(acd_map=True))
    variables = {"params": model.transformer_params}

    @jax.jit
    def sown():
        args = (noise, jnp.float32(1), condition, (4, 4), tokens)
        return with_map.apply(variables, *args, mutable=["intermediates"])[1]["intermediates"]

    wanted = concentration.density(sown_masses(sown(), "acd_map", 10), tokens).mean()
    found = run(indices=range(BATCH), num_steps=1).measures["acd"][0]
    assert found == pytest.approx(float(wanted), rel=1e-4)
    assert abs(found - 1) > 1e-3


def test_what_is_not_of_scenes_or_not_installed_is_left_out(monkeypatch):
    source = [scenes()[i] for i in range(2)]
    everything = set(base().measures)  # before the patch, which `base` must not be made under
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = run(source, range(2))
    assert set(found.measures) == everything - {"caption", "lpips"}
    resized = run(Scenes("heldout", 2, 2 * SIZE), range(2), size=(SIZE, SIZE))
    assert resized.images.shape == (2, SIZE, SIZE, 3)
    assert "caption" not in resized.measures


def test_is_read_as_it_was_written(tmp_path):
    base().save(tmp_path / "new" / "base.npz")
    read = Evaluation.load(tmp_path / "new" / "base.npz")
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["base.npz"]
    assert (read.names, read.settings, set(read.measures)) == (base().names, base().settings, set(base().measures))
    np.testing.assert_array_equal(read.images, base().images)
    for name, values in base().measures.items():
        np.testing.assert_array_equal(read.measures[name], values)


def test_settings_tell_other_data_models_and_rulers(monkeypatch):
    def settings(**options) -> dict:
        return dict(run(indices=[0], num_steps=1, **options).settings)

    first = settings()
    assert settings() == first
    blind = Editor(ModelFolder(small_run.model_folder()), jnp.float32, 16, attention=AttentionOptions(acd_layers=1))
    assert settings(model=blind)["acd_layers"] != first["acd_layers"]
    assert settings(source=Scenes("validation", 1, SIZE))["data"] != first["data"]
    of = ModelFolder.fingerprint
    for other in ("transformer", "vae", "text_encoder_2", "tokenizer"):  # an edit depends on all of them
        monkeypatch.setattr(
            ModelFolder, "fingerprint", lambda self, x, other=other: "another" * (x == other) or of(self, x)
        )
        assert settings()["model"] != first["model"]


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_damaged_file_is_no_evaluation(tmp_path, keep):
    file = tmp_path / "base.npz"
    base().save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match="not an evaluation"):
        Evaluation.load(file)


def test_refuses_what_it_cannot_measure():
    with pytest.raises(UserError, match=r"heldout-00000-add: no target image"):
        run([replace(scenes()[0], target=None)], [0])
    with pytest.raises(UsageError, match="no examples"):
        run(indices=[])
    with pytest.raises(UsageError, match="40 x 64 pixels found; multiples of 16") as error:
        run(size=(64, 40))
    assert "32x64" in error.value.remedy


# Tables


def made(success, psnr, names=("a", "b", "c"), **settings) -> Evaluation:
    measures = {"success": np.array(success, np.float32), "psnr": np.array(psnr, np.float32)}
    return Evaluation(names, measures, np.zeros((len(names), 1, 1, 3), np.uint8), settings)


COLUMNS = (Column("success", "success", 2, "↑"), Column("psnr", "PSNR", 1, "↑"), Column("lpips", "LPIPS", 3, "↓"))


def test_tables_have_a_row_a_variant_and_differences_in_pairs():
    variants = {
        "base": [made([0.1, 0.5, 0.9], [20, 30, 25])],
        "global": [made([0.2, 0.6, 1.0], [20, 29, 26])] * 2,
        "region": [made([0.2, 0.6, 1.0], [20, 29, 26])],
    }
    assert markdown(make_tables(variants, COLUMNS)).splitlines() == [
        "**Mean of 3 edits [95 % interval]**",
        "",
        "| variant | seeds | success ↑ | PSNR ↑ |",
        "| --- | --- | --- | --- |",
        "| base | 1 | 0.50 [-0.49, 1.49] | 25.0 [12.6, 37.4] |",
        "| global | 2 | 0.60 [-0.39, 1.59] | 25.0 [13.6, 36.4] |",
        "| region | 1 | 0.60 [-0.39, 1.59] | 25.0 [13.6, 36.4] |",
        "",
        "**Difference from base, in pairs (* excludes zero)**",
        "",
        "| variant | success ↑ | PSNR ↑ |",
        "| --- | --- | --- |",
        "| global | +0.10 [+0.10, +0.10] * | +0.0 [-2.5, +2.5] |",
        "| region | +0.10 [+0.10, +0.10] * | +0.0 [-2.5, +2.5] |",
        "",
        "**Difference from the row above, in pairs**",
        "",
        "| variants | success ↑ | PSNR ↑ |",
        "| --- | --- | --- |",
        "| global - base | +0.10 [+0.10, +0.10] * | +0.0 [-2.5, +2.5] |",
        "| region - global | +0.00 [+0.00, +0.00] | +0.0 [+0.0, +0.0] |",
        "",
        "**Difference of each seed from base, in pairs; intervals over edits**",
        "",
        "| variant | seed | success ↑ | PSNR ↑ |",
        "| --- | --- | --- | --- |",
        *[f"| global | {seed} | +0.10 [+0.10, +0.10] * | +0.0 [-2.5, +2.5] |" for seed in (0, 1)],
    ]


def test_success_is_told_by_kind_where_names_tell_it():
    names = ("x-00000-add", "x-00001-remove", "x-00002-add")
    *_, table = make_tables({"base": [made([0.2, 0.5, 0.4], [20, 30, 25], names)]}, COLUMNS)
    assert table.title == "Edit success by kind"
    assert table.lines[0] == ["variant", "add", "remove"]
    assert [cell.split()[0] for cell in table.lines[1]] == ["base", "0.300", "0.500"]


def test_plain_tables_are_aligned():
    text = plain(make_tables({"base": [base()], "a longer name": [base()]})).splitlines()
    assert text[0] == f"Mean of {COUNT} edits [95 % interval]"
    assert "LPIPS ↓" in text[1]
    assert {line.index("[") for line in text[2:4]} == {text[2].index("[")}
    assert all(line == line.rstrip() for line in text)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (made([1, 1, 1], [1, 1, 1], names=("a", "b", "d"), steps=28), "other names of examples"),
        (made([1, 1], [1, 1], names=("a", "b"), steps=28), "examples 3 and 2"),
        (made([1, 1, 1], [1, 1, 1], steps=8), "steps 28 and 8"),
    ],
)
def test_only_like_is_compared_with_like(other, problem):
    with pytest.raises(UserError, match=f"{problem} found; the same examples and settings were wanted"):
        make_tables({"base": [made([1, 1, 1], [1, 1, 1], steps=28)], "other": [other]})


# The command


def evaluate_command(out, *argv: str) -> None:
    values = {
        "model": small_run.model_folder(),
        "out": out,
        "data": "scenes:heldout:3",
        "size": "64x64",
        "steps": STEPS,
    }
    values |= {"text_tokens": 16, "dtype": "float32"}
    command.run([*(f"--{name}={value}" for name, value in values.items()), *argv])


def test_the_command_compares_base_and_lora(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lora = save_lora(tmp_path / "lora", adapter(), LoRAConfig(4, 8.0))
    out = tmp_path / "out"
    evaluate_command(out, f"--lora={lora}")
    printed = capsys.readouterr().out
    assert "Difference from base" in printed
    assert MISSING in printed
    assert "LPIPS ↓" not in printed
    assert {x.name for x in out.iterdir()} == {"base.npz", "lora.npz", "table.md", "grid.png"}
    assert "last 3 blocks" in printed  # all it has
    assert MISSING in (out / "table.md").read_text()
    pair = [Evaluation.load(out / f"{name}.npz") for name in ("base", "lora")]
    assert pair[0].names == pair[1].names
    assert markdown(make_tables({"base": pair[:1], "lora": pair[1:]})) in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--lora=nowhere"], "lora: nowhere does not exist"),
        (["--data=scenes:heldout:0"], "count 0 found"),
        (["--data=scenes:heldot"], "'heldot' found"),
        (["--data=scenes:heldout:3:0.4"], "40% flawed targets"),
        (["--size=100x64"], "100 x 64 pixels found"),
        (["--guidance=nan"], "--guidance: nan"),
        (["--data={data}"], "no target image"),
        (["--out={data}/metadata.jsonl"], "--out: "),
    ],
    ids=" ".join,
)
def test_the_command_says_what_is_wrong(tmp_path, argv, problem):
    argv = [x.format(data=small_run.data_folder()) for x in argv]
    with pytest.raises(UserError, match=problem):
        evaluate_command(tmp_path / "out", *argv)
    assert not list(tmp_path.rglob("*.npz"))
