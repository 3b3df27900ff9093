"""Batches of supervised examples follow from the step alone."""

import re

import numpy as np
import pytest
import small_run

from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.images import resize_image, resize_mask
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.encoding.triples import TripleBatches
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.weights.tokenizers import load_tokenizers

SIZE, TOKENS = 32, 24


def test_batches_follow_from_the_step_alone():
    tokenizers = load_tokenizers(small_run.model_folder())

    def make(seed: int) -> TripleBatches:
        return TripleBatches(Scenes("train", 6), (SIZE, 2 * SIZE), 4, seed, tokenizers, TOKENS)

    one, other = make(0), make(0)
    forward, backward = [one[i] for i in range(3)], [other[i] for i in (2, 1, 0)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.instructions == b.instructions
        for x, y in zip(a[:5], b[:5], strict=True):
            np.testing.assert_array_equal(x, y)
    epoch = [text for batch in forward for text in batch.instructions]
    scenes = [Scenes("train", 6)[i] for i in range(6)]
    assert sorted(epoch[:6]) == sorted(epoch[6:]) == sorted(scene.instruction for scene in scenes)
    assert [text for i in range(3) for text in make(1)[i].instructions] != epoch

    scene = next(scene for scene in scenes if scene.instruction == epoch[0])
    np.testing.assert_array_equal(forward[0].source[0], resize_image(scene.image, (SIZE, 2 * SIZE)))
    np.testing.assert_array_equal(forward[0].target[0], resize_image(scene.target, (SIZE, 2 * SIZE)))
    np.testing.assert_array_equal(forward[0].mask[0], resize_mask(scene.mask, (SIZE, 2 * SIZE)))
    assert forward[0].clip.shape == (4, 77)
    assert forward[0].t5.shape == (4, TOKENS)


def test_an_unreadable_image_is_reported_by_the_step_that_needs_it(tmp_path):
    folder = small_run.write_broken_scenes(tmp_path / "data", SIZE)
    batches = TripleBatches(EditFolder(folder), (SIZE, SIZE), 1, 0, load_tokenizers(small_run.model_folder()), TOKENS)
    failed = []
    for step in range(8):
        try:
            batches[step]
        except UserError as error:
            failed.append((step, error.problem))
    ((step, problem),) = failed
    assert re.search(r"00005\S*\.png: the file is not an image", problem)
    with pytest.raises(UserError, match="00005"):  # again when asked again
        batches[step]
