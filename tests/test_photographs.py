"""The photographs behind the `photo` split come with two packages, or with an instruction to install them."""

import importlib.util

import pytest
from PIL import Image

from rcgrpo_jax.data.scenes.photographs import find_photographs
from rcgrpo_jax.errors import UserError


def test_are_pictures():
    found = find_photographs()
    assert len(found) == 6
    for file in found.values():
        assert min(Image.open(file).size) >= 256


@pytest.mark.parametrize(("package", "distribution"), [("skimage", "scikit-image"), ("sklearn", "scikit-learn")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, distribution):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=rf"{distribution} is not installed.*\n?.*pip install -e '\.\[photo\]'"):
        find_photographs()


def test_a_package_without_its_pictures_is_named(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("skimage", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="there is no such file"):
        find_photographs()
