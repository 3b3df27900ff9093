"""Soft masks are read as they are, label maps are refused or read by the values that the user names."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from rcgrpo_jax.data.masks import parse_mask_value, read_mask
from rcgrpo_jax.errors import UsageError, UserError


def disk(size: int = 96, radius: int = 30, supersampling: int = 1) -> Image.Image:
    image = Image.new("L", (size * supersampling, size * supersampling))
    low, high = (size // 2 - radius) * supersampling, (size // 2 + radius) * supersampling
    ImageDraw.Draw(image).ellipse((low, low, high, high), fill=255)
    return image.resize((size, size), Image.Resampling.BOX)


def blurred(radius: int) -> Image.Image:
    return disk().filter(ImageFilter.GaussianBlur(radius))


def scaled_to_16_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)


def areas(*levels: int, dtype: type = np.uint8) -> Image.Image:
    """Bands of levels on a background of 0."""
    labels = np.zeros((96, 96), dtype)
    for i, level in enumerate(levels):
        labels[10 + 14 * i : 20 + 14 * i, 10:80] = level
    return Image.fromarray(labels)


def with_palette(image: Image.Image, *colours: int) -> Image.Image:
    image = Image.fromarray(np.asarray(image))
    image.putpalette([*colours, *[0] * (768 - len(colours))])
    return image


def void_around(image: Image.Image) -> Image.Image:
    labels = np.asarray(image)
    grown = np.asarray(Image.fromarray(labels).filter(ImageFilter.MaxFilter(9)))
    return Image.fromarray(np.where((grown > 0) & (labels == 0), 255, labels).astype(np.uint8))


def step_of_one_pixel() -> Image.Image:
    """A rectangle that covers 6 % of the pixels along one edge."""
    mask = np.asarray(areas(255)).copy()
    mask[20, 10:80] = 15
    return Image.fromarray(mask)


SOFT = {
    "hard": disk(),
    "one bit": disk().convert("1"),
    "white": Image.new("L", (96, 96), 255),
    "anti-aliased": disk(supersampling=2),
    "anti-aliased more": disk(supersampling=8),
    "one soft edge": step_of_one_pixel(),
    "feathered": blurred(2),
    "feathered widely": blurred(20),
    "a soft dot without white": disk(radius=6).filter(ImageFilter.GaussianBlur(8)),
    "enlarged": disk(48, 15, 4).resize((96, 96), Image.Resampling.NEAREST),
    "palette": blurred(3).quantize(16),
    "palette of 8": blurred(6).quantize(8),
    "RGB": blurred(3).convert("RGB"),
    "16 bits": scaled_to_16_bits(disk()),
    "16 bits feathered": scaled_to_16_bits(blurred(3)),
    "half grey": areas(128),
    "a band of the unknown": Image.fromarray(np.maximum(disk(), np.asarray(disk(radius=40)) // 2)),
}


@pytest.mark.parametrize("polarity", ["white", "black"])
@pytest.mark.parametrize("kind", SOFT)
def test_soft_masks_are_luminances(tmp_path, kind, polarity):
    SOFT[kind].save(tmp_path / "a.png")
    mask = read_mask(tmp_path / "a.png", polarity)
    grey = np.asarray(SOFT[kind], np.float32) / 257 if "16" in kind else np.asarray(SOFT[kind].convert("L"))
    white = np.rint(grey).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(mask, white if polarity == "white" else 1 - white)


@pytest.mark.parametrize("quality", [30, 60, 75, 95])
def test_what_jpeg_makes_of_black_and_white_is_a_soft_mask(tmp_path, quality):
    for i, image in enumerate((disk(), disk().convert("RGB"), Image.new("L", (96, 96), 255))):
        image.save(tmp_path / f"{i}.jpg", quality=quality)
        np.testing.assert_allclose(read_mask(tmp_path / f"{i}.jpg").mean(), np.mean(image) / 255, atol=0.01)


LABELS = {
    "a class": (areas(15), "0: 92.4 %, 15: 7.6 %"),
    "class 1": (areas(1), "1: 7.6 %"),
    "no class 0": (Image.fromarray(np.asarray(areas(3)) + np.uint8(2)), "2: 92.4 %, 5: 7.6 %"),
    "one class everywhere": (Image.new("L", (96, 96), 15), "15: 100 %"),
    "many classes": (areas(1, 2, 3, 4, 5, 6), "and 1 more"),
    "thin lines": (Image.fromarray(np.eye(96, dtype=np.uint8) * 7), "7: 1.04 %"),
    "classes and 255 to ignore": (areas(15, 255), "255: 7.6 %"),
    "a class with 255 around it": (void_around(areas(15)), "15: 7.6 %"),
    "a grey class": (areas(70), "70: 7.6 %"),
    "greys of the void": (Image.fromarray(255 - np.asarray(areas(15))), "240: 7.6 %"),
    "class numbers of 16 bits": (areas(7001, 7002, dtype=np.uint16), "7001: 7.6 %"),
    "8 bits in 16": (areas(255, dtype=np.uint16), "255: 7.6 %"),
    "smoothed labels": (areas(15).resize((70, 70), Image.Resampling.BILINEAR), "more"),
    "palette": (with_palette(areas(1), 0, 0, 0, 128, 0, 0), r"0 \(#000000\): 92.4 %, 1 \(#800000\): 7.6 %"),
    "palette with white": (with_palette(areas(1, 2), 0, 0, 0, 255, 0, 0, 255, 255, 255), r"1 \(#ff0000\)"),
    "colours": (with_palette(areas(1), 0, 0, 0, 255, 255, 0).convert("RGB"), "#ffff00: 7.6 %"),
}  # fmt: skip


@pytest.mark.parametrize("polarity", ["white", "black"])
@pytest.mark.parametrize("kind", LABELS)
def test_label_maps_are_refused_with_their_values(tmp_path, kind, polarity):
    if kind == "one class everywhere" and polarity == "black":
        pytest.skip("nearly black everywhere is a region everywhere")
    image, values = LABELS[kind]
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match=values) as caught:
        read_mask(tmp_path / "a.png", polarity)
    assert "mask_value" in caught.value.problem
    assert "--mask_value=" in caught.value.remedy


def test_label_maps_saved_with_losses_are_refused_too(tmp_path):
    for i, image in enumerate((areas(15), areas(70), LABELS["colours"][0], disk().point(lambda x: x // 4))):
        image.save(tmp_path / f"{i}.jpg")
        with pytest.raises(UserError, match=r"label map|colours"):
            read_mask(tmp_path / f"{i}.jpg")


@pytest.mark.parametrize(("image", "value", "rows"), [
    (areas(15, 7), "15", [0]),
    (areas(15, 7), "7, 15", [0, 1]),
    (areas(15, 7), "#0f0f0f", [0]),
    (areas(1), "1", [0]),
    (areas(255), "255", [0]),
    (areas(7001, 7002, dtype=np.uint16), "7002", [1]),
    (with_palette(areas(1, 2), 0, 0, 0, 128, 0, 0, 128, 0, 0), "1", [0]),
    (with_palette(areas(1, 2), 0, 0, 0, 128, 0, 0, 128, 0, 0), "#800000", [0, 1]),
    (LABELS["colours"][0], "#FFFF00", [0]),
    (areas(9, 5).convert("RGB"), "5", [1]),
])  # fmt: skip
def test_the_values_of_the_region_can_be_named(tmp_path, image, value, rows):
    image.save(tmp_path / "a.png")
    mask = read_mask(tmp_path / "a.png", mask_value=value)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, np.asarray(areas(*(255 * (i in rows) for i in range(2)))) / 255)


def test_a_palettes_transparent_background_is_no_matter_where_a_value_is_named(tmp_path):
    with_palette(areas(1), 0, 0, 0, 128, 0, 0).save(tmp_path / "a.png", transparency=0)
    assert read_mask(tmp_path / "a.png", mask_value="1").sum() == 700
    with pytest.raises(UserError, match="transparent pixels"):
        read_mask(tmp_path / "a.png")


def test_a_value_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    areas(15).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"no pixel of the mask has mask_value = 3; found 0: 92\.4 %, 15: 7\.6 %"):
        read_mask(tmp_path / "a.png", mask_value="3")
    areas(15).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="a JPEG, which does not keep the values"):
        read_mask(tmp_path / "a.jpg", mask_value="15")


@pytest.mark.parametrize("text", ["red", "-1", "65536", "1.0", "#f00", "1,,2", "\u0661", "0x0f", "#gggggg"])
def test_malformed_values_are_refused(text):
    with pytest.raises(UsageError, match=r"mask_value: .* found; numbers from 0 to 65535 or colours such as #800000"):
        parse_mask_value(text)


def test_a_value_beside_black_as_the_region_is_refused(tmp_path):
    assert parse_mask_value(" ") == ()
    with pytest.raises(UsageError, match="black found beside mask_value = 15"):
        read_mask(tmp_path / "a.png", "black", "15")
