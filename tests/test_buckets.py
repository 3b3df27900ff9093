"""Aspect-ratio buckets: sizes, crops, and the order of their batches."""

import dataclasses

import numpy as np
import pytest
import small_run
from PIL import Image

from rcgrpo_jax.data.buckets import make_buckets, window
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import KONTEXT_SIZES, read_image, resize_image, resize_mask
from rcgrpo_jax.encoding.batches import Batches
from rcgrpo_jax.encoding.order import BatchOrder
from rcgrpo_jax.parallel import distributed


def make_example(height: int, width: int, region: tuple[slice, slice]) -> EditExample:
    mask = np.zeros((height, width), np.float32)
    mask[region] = 1
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return EditExample("a", image, mask, "Make it red.", target=255 - image)


def test_at_their_own_area_the_buckets_are_those_of_kontext():
    assert make_buckets("kontext", (1024, 1024)).sizes == tuple((height, width) for width, height in KONTEXT_SIZES)


@pytest.mark.parametrize("size", [(512, 512), (384, 640), (64, 64), (16, 16)])
def test_scaled_buckets_have_whole_sides_and_about_one_area(size):
    sizes = make_buckets("kontext", size).sizes
    assert len(set(sizes)) == len(sizes)
    assert not any(side % 16 for found in sizes for side in found)
    if min(size) > 64:
        areas = np.prod(sizes, axis=1) / np.prod(size)
        assert np.all((areas > 0.9) & (areas < 1.1))


def test_without_buckets_nothing_is_cut():
    example = make_example(40, 90, (slice(3, 9), slice(0, 90)))
    fitted = make_buckets("none", (64, 64)).fit(example)
    assert fitted.example is example
    assert (fitted.size, fitted.cut, fitted.lost) == ((64, 64), 0, 0)


@pytest.mark.parametrize(("shape", "size"), [
    ((500, 500), (512, 512)), ((400, 900), (336, 784)), ((900, 410), (752, 352)), ((10, 1000), (336, 784)),
])  # fmt: skip
def test_a_picture_takes_the_bucket_of_the_nearest_shape(shape, size):
    buckets = make_buckets("kontext", (512, 512))
    ratio = [abs(np.log(shape[0] / shape[1]) - np.log(height / width)) for height, width in buckets.sizes]
    assert buckets.nearest(*shape) == buckets.sizes[int(np.argmin(ratio))] == size


@pytest.mark.parametrize("shape", [(150, 201), (333, 120), (200, 200)])
def test_a_circle_stays_a_circle(shape):
    """Its height and width after the crop and the resizing are the same, to a pixel; squeezed they are not."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    circle = (rows - shape[0] / 2) ** 2 + (columns - shape[1] / 2) ** 2 < 45**2
    example = EditExample("a", np.repeat(np.uint8(255) * circle[..., None], 3, axis=2), np.float32(circle), "x")
    fitted = make_buckets("kontext", (256, 256)).fit(example)
    for picture in (resize_image(fitted.example.image, fitted.size)[..., 0] / 255,
                    resize_mask(fitted.example.mask, fitted.size)):  # fmt: skip
        height, width = (np.ptp(np.flatnonzero((picture > 0.5).any(axis))) + 1 for axis in (1, 0))
        assert abs(height - width) <= 1.5
        assert picture.sum() == pytest.approx(np.pi / 4 * height * width, rel=0.03)
    assert fitted.lost == 0
    assert fitted.cut < 0.2


def test_image_mask_and_target_are_cut_alike():
    example = make_example(100, 190, (slice(20, 40), slice(30, 60)))
    fitted = make_buckets("kontext", (256, 256)).fit(example)
    assert 0 < fitted.cut < 0.1
    for name in ("image", "mask", "target"):
        np.testing.assert_array_equal(getattr(fitted.example, name), getattr(example, name)[fitted.window])
    assert fitted.cut == pytest.approx(1 - fitted.example.mask.size / example.mask.size)


@pytest.mark.parametrize(("columns", "start", "lost"), [
    (slice(20, 30), 25, 1.0),  # what a crop to the middle would lose
    (slice(70, 80), 45, 0.0),  # it does not touch the region: the middle
])  # fmt: skip
def test_the_crop_keeps_the_region(columns, start, lost):
    mask = np.zeros((50, 140), np.float32)
    mask[10:20, columns] = 1
    found = window(mask, (16, 16))
    assert found[0] == slice(0, 50)
    assert found[1].stop - found[1].start == 50
    assert mask[found].sum() == mask.sum()
    middle = mask[:, 45:95]
    assert 1 - middle.sum() / mask.sum() == lost
    if lost:
        assert found[1] == slice(20, 70)  # as near to the middle as it can be
    else:
        assert found[1] == slice(45, 95)


def test_a_region_wider_than_the_crop_loses_the_least_that_it_can():
    example = make_example(10, 100, (slice(0, 10), slice(0, 100)))
    example.mask[:, 90:] = 0
    fitted = make_buckets("kontext", (512, 512)).fit(example)
    kept = fitted.example.mask
    assert fitted.lost == pytest.approx(1 - kept.shape[1] / 90)
    assert np.all(kept == 1)


def test_a_mask_of_the_whole_picture_loses_nothing():
    whole = dataclasses.replace(make_example(10, 100, (slice(0), slice(0))), mask=np.ones((10, 100), np.float32))
    assert make_buckets("kontext", (512, 512)).fit(whole).lost == 0


COUNTS = [50, 7, 1, 242]


def test_each_epoch_has_each_bucket_as_often_as_it_has_examples():
    prompts, epochs = 4, 6
    order = BatchOrder(COUNTS, prompts, seed=3)
    taken = [order[step] for step in range(epochs * sum(COUNTS) // prompts)]
    for bucket, count in enumerate(COUNTS):
        numbers = [batch for found, batch in taken if found == bucket]
        assert numbers == list(range(len(numbers)))  # none is left out, none comes twice
        assert abs(len(numbers) - epochs * count / prompts) <= len(COUNTS)


def test_the_order_is_a_function_of_the_step():
    wanted = [BatchOrder(COUNTS, 4, seed=3)[step] for step in range(0, 3000, 37)]
    order = BatchOrder(COUNTS, 4, seed=3)
    assert [order[step] for step in reversed(range(0, 3000, 37))] == wanted[::-1]
    assert [BatchOrder(COUNTS, 4, seed=4)[step] for step in range(0, 3000, 37)] != wanted


def test_one_bucket_has_its_batches_in_turn():
    order = BatchOrder([5], 2, seed=0)
    assert [order[step] for step in range(600)] == [(0, step) for step in range(600)]


class Indices:
    """Stands for a cache: its entries say which example they are of, and its size."""

    def __init__(self, sizes: list[tuple[int, int]]):
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict:
        size = self.sizes[index]
        text = np.full((2,), index)
        return {"text": text, "pixels": np.zeros((*size, 3), np.uint8), "mask": np.ones(size), "instruction": "x"}


def two_buckets() -> tuple[Indices, list[list[int]]]:
    source = Indices([(48, 96), (96, 48), (48, 96), (48, 96), (96, 48), (48, 96), (96, 48)])
    return source, [[0, 2, 3, 5], [1, 4, 6]]


def examples_of(batches: Batches, steps: int) -> list[list[int]]:
    return [batches[step].encoded["text"][:, 0].tolist() for step in range(steps)]


def test_a_batch_is_of_one_bucket_and_each_epoch_has_each_example():
    source, buckets = two_buckets()
    batches = Batches(source, 2, 0, buckets)
    drawn = examples_of(batches, 70)  # 20 epochs
    assert all(set(batch) <= set(bucket) for batch in drawn for bucket in buckets if batch[0] in bucket)
    counts = np.bincount(np.concatenate(drawn), minlength=7)
    assert np.all(np.abs(counts - 20) <= 2)
    assert {batches[step].mask.shape for step in range(10)} == {(2, 48, 96), (2, 96, 48)}


def test_processes_agree_on_the_examples_of_a_step(monkeypatch):
    source, buckets = two_buckets()
    whole = examples_of(Batches(source, 2, 0, buckets), 9)
    parts = []
    for process in range(2):
        monkeypatch.setattr(distributed, "local_row_range", lambda rows, i=process: range(i, i + 1))
        parts.append(examples_of(Batches(source, 2, 0, buckets), 9))
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def write_shapes(folder, shapes) -> None:
    """Examples of several shapes: a frame in the picture's colours, a disc in its middle, which is the region."""
    folder.mkdir()
    rows = []
    for i, (height, width) in enumerate(shapes):
        y, x = np.ogrid[:height, :width]
        disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 3) ** 2
        image = np.stack(np.broadcast_arrays(y * 255 // height, x * 255 // width, 40 + 50 * i % 200), -1)
        Image.fromarray(np.where(disc[..., None], 230, image).astype(np.uint8)).save(folder / f"{i}.png")
        mask = disc if i else np.broadcast_to(y < height / 2, disc.shape)
        Image.fromarray(np.uint8(255) * mask).save(folder / f"mask{i}.png")
        rows.append(f'{{"image": "{i}.png", "mask": "mask{i}.png", "instruction": "Paint it {i}."}}')
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def test_the_preview_counts_and_names_what_is_cut(capsys, tmp_path):
    write_shapes(tmp_path / "data", [(60, 300), (100, 100), (101, 100), (120, 80)])
    argv = ("--data", str(tmp_path / "data"), "--size", "256x256", "--out", str(tmp_path / "sheet.png"))
    code, out, _ = small_run.run_command(capsys, "data", "preview", *argv)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["256", "x", "256", "2", "0.5", "%", "1.0", "%"] in rows
    assert len([row for row in rows if row[:1] != ["width"] and row[1:2] == ["x"]]) == 3
    (lost,) = (row for row in rows if row[-1:] == ["cut"])
    assert float(lost[1]) == pytest.approx(100 * (1 - 140 / 300), abs=2)  # 784:336 of 5:1
    sheet = read_image(tmp_path / "sheet.png")
    assert (sheet == (20, 90, 220)).all(-1).any()  # the crop


@pytest.mark.parametrize(("flag", "problem"), [
    ("--size=100x100", "--size: 100x100"), ("--size=big", "--size"), ("--shown=0", "shown"), ("--out=x.txt", "out"),
])  # fmt: skip
def test_what_the_preview_cannot_do_is_said(capsys, tmp_path, flag, problem):
    argv = small_run.last_of_each(f"--data={small_run.data_folder()}", f"--out={tmp_path}/a.png", flag)
    assert problem in small_run.fail(capsys, "data", "preview", *argv)[1]


def test_the_preview_does_not_replace_a_picture_that_it_reads(capsys):
    data = small_run.data_folder()
    assert "which is read" in small_run.fail(capsys, "data", "preview", f"--data={data}", f"--out={data}/0.png")[1]
