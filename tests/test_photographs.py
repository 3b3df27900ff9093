"""The example photographs make a folder that trains: masks on their objects, and colours that can be scored."""

import importlib.util

import numpy as np
import pytest

from rcgrpo_jax.data import EditFolder
from rcgrpo_jax.data.images import read_image, read_mask
from rcgrpo_jax.data.photographs import write_photographs
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards.colour import Colour, named_colour


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs") / "new" / "folder")


def test_the_folder_reads_back(folder):
    examples = list(EditFolder(folder))
    assert len(examples) == 12
    for example in examples:
        assert set(np.unique(example.mask)) == {0.0, 1.0}
        assert example.caption
    # The outlines are in pixels of photographs of these sizes; masks of another size do not get past EditFolder.
    assert {example.image.shape[:2] for example in examples} == {(512, 512), (300, 451), (400, 600), (427, 640)}


@pytest.mark.parametrize(("region", "photograph", "area", "colour"), [
    ("suit", "astronaut.png", 0.219, (200, 90, 57)),
    ("helmet", "astronaut.png", 0.124, (47, 43, 41)),
    ("eyes", "chelsea.png", 0.033, (92, 73, 38)),
    ("nose", "chelsea.png", 0.0079, (97, 38, 16)),
    ("cup", "coffee.png", 0.160, (173, 122, 97)),
    ("coffee", "coffee.png", 0.0505, (209, 119, 45)),
    ("saucer", "coffee.png", 0.235, (138, 37, 16)),
    ("spoon", "coffee.png", 0.0268, (125, 89, 67)),
    ("rocket", "rocket.jpg", 0.0182, (164, 149, 122)),
])  # fmt: skip
def test_masks_lie_on_their_objects(folder, region, photograph, area, colour):
    """The share of the photograph and the mean colour are of outlines that were checked by eye."""
    inside = read_mask(folder / "masks" / f"{region}.png") == 1
    assert inside.mean() == pytest.approx(area, rel=0.02)
    pixels = read_image(folder / "images" / photograph)[inside]
    np.testing.assert_allclose(pixels.mean(axis=0), colour, atol=2)


def test_regions_of_one_photograph_share_at_most_their_edges(folder):
    for first, second in (("suit", "helmet"), ("cup", "coffee"), ("cup", "saucer"), ("cup", "spoon")):
        one, other = (read_mask(folder / "masks" / f"{name}.png") for name in (first, second))
        assert (one * other).sum() < 0.05 * min(one.sum(), other.sum())


def test_every_instruction_names_its_target_colour(folder):
    instructions = [example.instruction for example in EditFolder(folder)]
    for instruction in instructions:
        Colour().validate(instruction)
    wanted = "blue green red deepskyblue purple blue yellow lightgreen darkgreen gold red orange"
    assert [named_colour(instruction) for instruction in instructions] == wanted.split()


def test_two_writes_are_the_same_bytes(folder, tmp_path):
    write_photographs(tmp_path)
    first, second = (
        {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*.*")}
        for root in (folder, tmp_path)
    )
    assert len(first) == 4 + 9 + 1
    assert first == second


def test_a_missing_scikit_image_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rcgrpo_jax\[demo\]'"):
        write_photographs(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the examples cannot be written"):
        write_photographs(tmp_path / "file")
