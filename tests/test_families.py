"""Another family of models is one file and one line: a toy of one goes the ways that users go."""

import jax
import numpy as np
import pytest
import small_run
import toy_family
from toy_family import Toy, ToyEditor

from rcgrpo_jax.data.images import read_image, save_image
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.editors.open import FAMILIES, open_model
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.edit import edit_all, initial_noise
from rcgrpo_jax.evaluation.evaluate import evaluate
from rcgrpo_jax.evaluation.measure import measure
from rcgrpo_jax.experiments.export import export
from rcgrpo_jax.method import concentration, region
from rcgrpo_jax.options import read_options
from rcgrpo_jax.plan.programs import open_flux
from rcgrpo_jax.report.heatmaps import attention_maps
from rcgrpo_jax.rl.setup import set_up
from rcgrpo_jax.rl.trainer import train
from rcgrpo_jax.sft.config import default_config as sft_config
from rcgrpo_jax.sft.options import Options as SftOptions
from rcgrpo_jax.sft.train import open_folder, train_supervised
from rcgrpo_jax.weights.lora import load_lora, load_loras

TARGETS = "attn/to_[qkv]|proj_out"
EDITING = {"num_steps": 2, "guidance": 3.0, "seed": 1}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A folder of the toy family, which is known for the length of the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "Toy", Toy)
        yield toy_family.write_toy(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def encodings():
    """How many pictures each call of the encoders had."""
    counts, encode = [], ToyEditor.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyEditor, "encode", lambda self, x, texts: counts.append(len(x)) or encode(self, x, texts))
        yield counts


def make_config(path, **changes):
    own = {"model__path": str(path), "data__cache": "", "lora__targets": TARGETS, "acd__layers": 1}
    return small_run.make_config(**own | {"train__save_every": 1} | changes)


@pytest.fixture(scope="module")
def trained(model_path, encodings, tmp_path_factory):
    """A run of two steps, in one go: its directory and its last state."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    return workdir, train(make_config(model_path, train__num_steps=2), workdir, jax.devices()[:1])


@pytest.fixture(scope="module")
def lora(trained, model_path, tmp_path_factory):
    """The exported LoRA, twenty times as strong."""
    file = export(trained[0], tmp_path_factory.mktemp("toy") / "lora", dtype="float32")
    return load_loras([file], [20.0], open_model(model_path).param_shapes)


def open_editor(path, **options) -> ToyEditor:
    return open_model(path).open(EditorOptions(**options))


def test_a_run_encodes_once_and_resumes_bit_for_bit(trained, model_path, encodings, tmp_path):
    whole, wanted = trained
    assert sum(encodings) == len(small_run.EDITS)
    for steps in (1, 2):
        state = train(make_config(model_path, train__num_steps=steps), tmp_path / "run", jax.devices()[:1])
    assert sum(encodings) == 2 * len(small_run.EDITS)  # for two directories, and not for the resumed run
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted.params)
    assert any(x.any() for x in jax.tree.leaves(wanted.params["proj_out"]["B"]))
    for line, other in zip(*map(small_run.metrics_without_times, (whole, tmp_path / "run")), strict=True):
        assert line == other
        assert line["reward/acd"] > 0


def test_a_run_does_not_go_on_with_another_model(trained, model_path, tmp_path):
    other = toy_family.write_toy(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="model_digest"):
        train(make_config(other, train__num_steps=3), trained[0], jax.devices()[:1])


@pytest.mark.slow
def test_edits_are_evaluated_with_and_without_the_lora(lora, model_path, tmp_path):
    editor, source = open_editor(model_path), Scenes("heldout", 2, 32)
    base, tuned = (evaluate(editor, source, range(2), lora=x, **EDITING) for x in (None, lora))
    assert base.settings == tuned.settings
    assert base.settings["model"] == open_model(model_path).whole_fingerprint()
    assert base.settings["text_tokens"] == toy_family.TEXT
    assert np.any(base.images != tuned.images)
    edit_all(editor, source, range(2), tmp_path / "edits", lora=lora, **EDITING)
    kept = measure(tmp_path / "edits", source)
    assert kept.settings == tuned.settings
    np.testing.assert_array_equal(kept.images, tuned.images)
    np.testing.assert_allclose(kept.measures["acd"], tuned.measures["acd"], rtol=1e-5)


@pytest.mark.slow
def test_the_masses_are_those_of_its_maps(model_path):
    source = Scenes("heldout", 2, 32)
    found = evaluate(open_editor(model_path), source, range(2), **EDITING)
    images, masks = (np.stack([getattr(source[i], name) for i in range(2)]) for name in ("image", "mask"))
    noise = initial_noise(np.uint32(EDITING["seed"]), np.arange(2), (16, toy_family.CHANNELS))
    texts = [source[i].instruction for i in range(2)]
    how = EDITING["num_steps"], EDITING["guidance"]
    maps = attention_maps(open_editor(model_path), images, texts, masks, noise, *how)
    np.testing.assert_array_equal(maps.edited, found.images)
    for i in range(2):
        tokens = region.token_region(masks[i], (4, 4))
        assert float(concentration.density(maps.maps[i], tokens)) == pytest.approx(found.measures["acd"][i], rel=1e-4)


def test_a_lora_has_the_names_of_diffusers(trained, model_path, tmp_path):
    workdir, state = trained
    file, params = export(workdir, tmp_path, dtype="float32"), open_model(model_path).param_shapes
    assert "transformer.attn.to_q.lora_A.weight" in "".join(small_run.tensors(tmp_path))
    read, config = load_lora(file, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), read, state.averaged)
    assert config.rank == 4
    with pytest.raises(UsageError, match="--format: kohya found; diffusers was wanted"):
        export(workdir, tmp_path, form="kohya")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"acd__layers": 2}, "acd.layers: 2; the model has 1 blocks"),
        ({"rollout__share": "region", "explore__alpha_base": 0.0}, "rollout.share: region; candidates of this model"),
        ({"mesh__tensor": 2}, "mesh.tensor: 2; the model has 1 heads"),
        ({"lora__targets": "attention"}, "matches no linear layer"),
    ],
)
def test_its_sizes_are_what_a_configuration_is_held_to(model_path, changes, problem):
    devices = jax.devices()[: changes.get("mesh__tensor", 1)]
    with pytest.raises(UsageError, match=problem):
        set_up(make_config(model_path, **changes), devices)


def test_what_it_cannot_do_it_refuses_itself(model_path):
    with pytest.raises(UsageError, match="quantization: int8 found"):
        open_editor(model_path, quantization="int8")


def test_a_command_edits_with_it(capsys, model_path, tmp_path):
    source = Scenes("heldout", 1, 32)[0]
    save_image(tmp_path / "in.png", source.image)
    argv = [
        "edit", f"--model={model_path}", f"--image={tmp_path / 'in.png'}", f"--instruction={source.instruction}",
        f"--out={tmp_path / 'out.png'}", "--steps=2", "--size=32x32", "--dtype=float32",
    ]  # fmt: skip
    assert small_run.run_command(capsys, *argv)[0] == 0
    noise = jax.random.normal(jax.random.key(0), (1, 16, toy_family.CHANNELS))
    wanted = open_editor(model_path).edit(source.image[None], [source.instruction], noise, num_steps=2)[0]
    np.testing.assert_array_equal(read_image(tmp_path / "out.png"), wanted)


def test_an_unknown_class_names_the_known_ones(capsys, tmp_path, model_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    argv = (f"--model={tmp_path}", f"--data={small_run.data_folder()}", f"--out={tmp_path / 'out'}")
    code, problem, remedy = small_run.fail(capsys, "evaluate", *argv)
    assert code == 1
    assert problem == (
        f"{tmp_path}/model_index.json: _class_name is 'OtherPipeline'; one that begins with Flux or Toy was wanted."
    )
    assert "CONTRIBUTING.md" in remedy


@pytest.mark.slow
def test_supervised_training_fits_a_lora_to_it(model_path, encodings, tmp_path):
    config, before = sft_config(), sum(encodings)
    config.stage = "lora"
    config.model.update(path=str(model_path), dtype="float32", max_text_tokens=0, remat="none")
    config.data.update(path="scenes:train:4", size=(32, 32))
    config.batch.size, config.flow.picture_steps = 4, 2
    config.lora.update(rank=4, targets=TARGETS)
    config.optimizer.learning_rate = 0.01
    config.train.update(num_steps=20, save_every=20, image_every=20)
    file = train_supervised(config, tmp_path / "run", jax.devices()[:1])
    losses = [line["loss"] for line in small_run.metrics_without_times(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert sum(encodings) == before + 4  # once, for twenty steps
    load_lora(file, open_model(model_path).param_shapes)


def test_plan_and_the_other_stages_are_for_flux_alone(model_path, tmp_path):
    config = sft_config()
    config.stage, config.model.path = "flow", str(model_path)
    options = read_options(SftOptions, config)
    for opened in (lambda: open_flux(str(model_path)), lambda: open_folder(options, tmp_path)):
        with pytest.raises(UserError, match="'ToyPipeline'; a pipeline of FLUX was wanted") as error:
            opened()
        assert error.value.remedy.startswith("Give a folder of FLUX.1-Kontext")
