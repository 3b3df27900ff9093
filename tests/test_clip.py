"""CLIP with both towers is transformers' CLIPModel, and the rewards that ask it measure what they say."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from references import torch, transformers
from safetensors.numpy import load_file, save_file
from skimage import data
from tiny_clip import write_clip

from rcgrpo_jax import rewards
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.models.clip_vision import CLIP, STD, crop, normalised, square_window
from rcgrpo_jax.models.config import CLIPConfig
from rcgrpo_jax.weights.clip import load_clip
from rcgrpo_jax.weights.networks import abstract_params

TEXTS = ("a red cup on a table", "Make it blue.", "snow " * 100)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """That of `tiny_clip`."""
    folder = write_clip(tmp_path_factory.mktemp("clip"))
    load_clip.cache_clear()
    return folder


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A 60 x 90 crop of a photograph, uint8."""
    return np.ascontiguousarray(data.coffee()[100:160, 200:290])


def theirs(folder: Path) -> "transformers.CLIPModel":
    return transformers.CLIPModel.from_pretrained(folder).eval()


def features(found) -> np.ndarray:
    return np.asarray(getattr(found, "pooler_output", found).detach())


# The network


def test_both_towers_are_those_of_transformers(clip_folder):
    folder = load_clip(str(clip_folder))
    tokens = folder.tokenize(TEXTS)
    pictures = np.random.default_rng(0).standard_normal((3, 30, 30, 3), np.float32)
    ours = jax.jit(CLIP(folder.config).apply)({"params": folder.params}, tokens, pictures)
    with torch.no_grad():
        model = theirs(clip_folder)
        texts = features(model.get_text_features(torch.from_numpy(tokens).long()))
        images = features(model.get_image_features(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())))
    assert ours[0].shape == ours[1].shape == (3, 20)
    np.testing.assert_allclose(ours[0], texts, atol=1e-4)
    np.testing.assert_allclose(ours[1], images, atol=1e-4)
    assert np.abs(texts).min(axis=0).max() > 0.01  # which are not near 0


def test_texts_are_tokenized_as_transformers_does_and_keep_their_end(clip_folder):
    tokens = load_clip(str(clip_folder)).tokenize(TEXTS)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    for text, ids in zip(TEXTS, tokens, strict=True):
        wanted = tokenizer(text, truncation=True, max_length=77)["input_ids"]
        assert ids[: len(wanted)].tolist() == wanted
        assert tokenizer.eos_token_id in ids


# Pictures


@pytest.mark.parametrize("size", [(60, 60), (61, 61), (30, 30), (24, 24), (60, 92), (100, 60), (224, 224)])
def test_pictures_are_prepared_as_transformers_processor_does(size):
    picture = np.asarray(Image.fromarray(data.coffee()).resize(size[::-1]))
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    wanted = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = crop(jnp.asarray(picture, jnp.float32) / 255, *square_window(jnp.ones(size), 0.25), 30)
    assert ours.shape == wanted.shape
    in_levels = np.abs(np.asarray(ours) - wanted) * STD * 255
    assert in_levels.max() < 2
    assert in_levels.mean() < 0.4


def test_the_window_around_a_region_is_square_and_lies_in_the_picture():
    mask = np.zeros((60, 90), np.float32)
    mask[20:30, 40:60] = 0.5
    corner, side = square_window(mask, 0.25)
    assert float(side) == 30  # 20 and a quarter of that on either side
    assert corner.tolist() == [10, 35]
    corner, side = square_window(np.roll(mask, (25, 30), (0, 1)), 0.25)  # at the lower right corner
    assert float(side) == 30
    assert corner.tolist() == [30, 60]
    corner, side = square_window(np.ones((60, 90), np.float32), 0.25)
    assert float(side) == 60
    assert corner.tolist() == [0, 15]


def test_a_window_is_resized_as_a_picture_of_its_own(photo):
    picture = jnp.asarray(photo, jnp.float32) / 255
    ours = crop(picture, jnp.array([12.0, 15.0]), jnp.array(45.0), 30)
    alone = crop(picture[12:57, 15:60], jnp.zeros(2), jnp.array(45.0), 30)
    np.testing.assert_allclose(ours[2:-2, 2:-2], alone[2:-2, 2:-2], atol=1e-4)
    flat = crop(jnp.full((20, 20, 3), 0.25), jnp.array([3.0, 4.0]), jnp.array(11.0), 30)  # enlarged
    np.testing.assert_allclose(flat, normalised(jnp.full((30, 30, 3), 0.25)), atol=1e-5)


# Rewards


def batch(photo) -> rewards.RewardInputs:
    rng = np.random.default_rng(0)
    source = np.stack([photo[:60, :60], photo[:60, 30:]]).astype(np.float32) / 255
    edited = np.clip(source[:, None] + 0.3 * rng.standard_normal((2, 3, 60, 60, 3)), 0, 1).astype(np.float32)
    edited[:, 0] = source
    mask = np.zeros((2, 60, 60), np.float32)
    mask[0, 20:40, 20:40] = mask[1, 5:35, 10:30] = 1
    return rewards.RewardInputs(source, edited, mask, TEXTS[:2], captions=("a red cup", "a blue cup"))


def reference_vectors(folder: Path, inputs: rewards.RewardInputs, texts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors of the windows of candidates [P, G, D], of sources [P, 1, D] and of texts, by transformers."""
    model, tokenizer = theirs(folder), transformers.CLIPTokenizer.from_pretrained(folder)

    def unit(x):
        return features(x) / np.linalg.norm(features(x), axis=-1, keepdims=True)

    def embed(pictures):
        windows = [
            [crop(picture, *square_window(mask, 0.25), 30) for picture in group]
            for group, mask in zip(pictures, inputs.mask, strict=True)
        ]
        windows = np.asarray(windows)
        flat = torch.from_numpy(windows.reshape(-1, 30, 30, 3).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            return unit(model.get_image_features(flat)).reshape(*windows.shape[:2], -1)

    tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        of_texts = unit(model.get_text_features(**tokens))
    return embed(inputs.edited), embed(inputs.source[:, None]), of_texts


@pytest.mark.parametrize("text", ["instruction", "caption"])
def test_similarity_to_a_text_is_that_of_transformers(clip_folder, photo, text):
    inputs = batch(photo)
    reward = rewards.make("clip_text", path=str(clip_folder), text=text)
    assert reward.needs_caption == (text == "caption")
    edited, _, texts = reference_vectors(
        clip_folder, inputs, inputs.captions if text == "caption" else inputs.instructions
    )
    scores = np.asarray(reward(inputs))
    np.testing.assert_allclose(scores, np.einsum("pgd,pd->pg", edited, texts), atol=1e-4)
    assert scores.std(axis=1).min() > 1e-3


def test_similarity_does_not_see_what_is_far_from_the_region(clip_folder, photo):
    inputs = batch(photo)
    reward = rewards.make("clip_text", path=str(clip_folder))
    elsewhere = inputs.edited.copy()
    elsewhere[0, :, 50:] = 0  # the window of the first prompt ends at 45
    changed = np.asarray(reward(inputs._replace(edited=elsewhere)))
    np.testing.assert_allclose(changed, reward(inputs), atol=1e-5)


def test_directional_similarity_has_its_formula_and_is_0_where_nothing_moved(clip_folder, photo):
    inputs = batch(photo)
    scores = np.asarray(rewards.make("clip_direction", path=str(clip_folder), source_text="a photo")(inputs))
    edited, source, texts = reference_vectors(clip_folder, inputs, (*inputs.instructions, "a photo"))
    moved, wanted = edited - source, texts[:2] - texts[2]
    lengths = np.linalg.norm(moved[:, 1:], axis=-1) * np.linalg.norm(wanted, axis=-1)[:, None]
    np.testing.assert_allclose(scores[:, 1:], np.einsum("pgd,pd->pg", moved[:, 1:], wanted) / lengths, atol=1e-3)
    np.testing.assert_array_equal(scores[:, 0], 0)


def test_a_candidate_that_is_not_finite_has_no_score(clip_folder, photo):
    inputs = batch(photo)
    inputs.edited[1, 2, 12, 12] = np.nan
    for name in ("clip_text", "clip_direction"):
        lost = np.isnan(np.asarray(rewards.make(name, path=str(clip_folder))(inputs)))
        assert lost.tolist() == [[False, False, False], [False, False, True]]


def test_scores_are_the_same_on_a_mesh(clip_folder, photo):
    inputs, reward = batch(photo), rewards.make("clip_text", path=str(clip_folder))
    alone = np.asarray(reward(inputs))
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        np.testing.assert_allclose(reward(inputs), alone, atol=1e-5)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(reward.function.params)} == {2}


# Folders


def broken(clip_folder: Path, target: Path, **changes) -> Path:
    """A copy of the folder with other fields in its config.json; dotted by two underscores."""
    shutil.copytree(clip_folder, target)
    file = target / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        *groups, field = name.split("__")
        group = config
        for part in groups:
            group = group[part]
        group[field] = value
    file.write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(("changes", "problem"), [
    ({"model_type": "siglip"}, "config.json: model_type is 'siglip'; only 'clip' is implemented"),
    ({"vision_config__hidden_act": "gelu"}, "config.json: vision_config: hidden_act is 'gelu'"),
    ({"vision_config__hidden_size": 33}, "config.json: vision_config: hidden_size is 33; a multiple of"),
    ({"text_config__hidden_size": "24"}, "config.json: text_config: hidden_size: '24' found"),
    ({"vision_config__num_hidden_layers": 4}, "16 tensors do not fit its config.json, the first: missing "),
    ({"projection_dim": 21}, "2 tensors do not fit its config.json, the first: mis-shaped "),
    ({"text_config__vocab_size": 300, "text_config__eos_token_id": 2}, "config.json has vocab_size 300"),
    ({"vision_config": 3}, "config.json: vision_config"),
])  # fmt: skip
def test_a_folder_of_another_kind_or_size_is_refused(clip_folder, tmp_path, changes, problem):
    with pytest.raises(UserError) as refused:
        rewards.make("clip_text", path=str(broken(clip_folder, tmp_path / "other", **changes)))
    assert problem in refused.value.problem
    assert str(tmp_path / "other") in refused.value.problem
    assert refused.value.problem.startswith("reward 'clip_text': ")
    assert len(str(refused.value).splitlines()) == 2


def test_what_is_no_clip_folder_is_refused(clip_folder, folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such folder; that of a CLIP model was wanted"):
        rewards.make("clip_text", path="/nowhere/at/all")
    with pytest.raises(UserError, match=r"reward 'clip_direction': \(empty\): no such folder"):
        rewards.make("clip_direction")
    with pytest.raises(UserError, match=r"config.json: no such file"):
        rewards.make("clip_text", path=str(folder))  # FLUX's
    with pytest.raises(UserError, match="model_type is 'clip_text_model'; only 'clip' is implemented"):
        rewards.make("clip_text", path=str(folder / "text_encoder"))
    other = broken(clip_folder, tmp_path / "other")
    (other / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(UserError, match=r"preprocessor_config.json: image_mean is \[0.5, 0.5, 0.5\]"):
        rewards.make("clip_text", path=str(other))
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    (other / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="pickle"):
        rewards.make("clip_text", path=str(other))


def test_a_name_on_the_hub_is_downloaded(clip_folder, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(clip_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert rewards.make("clip_text", path="openai/clip-vit-large-patch14").function.folder.config.projection_dim == 20
    assert asked == [("openai/clip-vit-large-patch14", ("*.json", "*.txt", "*.safetensors"))]


def test_a_name_that_the_hub_does_not_give_is_refused():
    with pytest.raises(UserError, match="nobody/nothing: not a local path, and the hub did not give it"):
        rewards.make("clip_text", path="nobody/nothing")


def test_a_model_is_described_by_its_weights_wherever_they_lie(clip_folder, tmp_path):
    def described(folder: Path):
        return rewards.make("clip_text", path=str(folder)).describe()

    known = described(clip_folder)
    assert described(broken(clip_folder, tmp_path / "moved")) == known
    file = broken(clip_folder, tmp_path / "other") / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"visual_projection.weight": tensors["visual_projection.weight"] + 1}, file)
    assert described(tmp_path / "other") != known
    assert {"reward_options.clip_text.path", "reward_options.clip_direction.path"} < set(
        rewards.incidental_fields(rewards.factories())
    )


def test_an_unknown_text_is_refused(clip_folder):
    with pytest.raises(UsageError, match="text: 'prompt' found; one of instruction, caption was wanted"):
        rewards.make("clip_direction", path=str(clip_folder), text="prompt")


def test_the_released_sizes_have_the_released_number_of_parameters():
    config = CLIPConfig.from_json({
        "model_type": "clip", "projection_dim": 768,
        "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "patch_size": 14},
    })  # fmt: skip
    shapes = jax.tree.leaves(abstract_params("clip", config))
    assert sum(x.size for x in shapes) + 1 == 427_616_513  # and the logit scale, which is not used
