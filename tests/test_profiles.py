"""Colour profiles become sRGB, by values that numpy computes from the definitions of the spaces."""

import io

import icc
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from rcgrpo_jax.data import images, masks

SPACES = {
    "Display P3": (icc.DISPLAY_P3, icc.srgb_decode),
    "Adobe RGB": (icc.ADOBE_RGB, icc.gamma_2_2),
    "sRGB": (icc.SRGB, icc.srgb_decode),
}


@pytest.fixture
def colours() -> np.ndarray:
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("space", ["Display P3", "Adobe RGB"])
def test_other_primaries_become_srgbs(tmp_path, colours, space, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colours).save(path, icc_profile=icc.rgb_profile(*SPACES[space]), **options)
    wanted = icc.in_srgb(colours, *SPACES[space])
    assert np.abs(wanted - colours).max() > 30
    np.testing.assert_allclose(images.read_image(path), wanted, atol=2)


def pillows_srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("profile", [pillows_srgb, lambda: icc.rgb_profile(*SPACES["sRGB"])])
def test_pictures_tagged_as_srgb_come_back_bit_for_bit(tmp_path, colours, profile):
    Image.fromarray(colours).save(tmp_path / "a.png", icc_profile=profile())
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), colours)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles_of_grey_pictures(tmp_path, mode):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey)
    image = image.convert("LA") if mode == "LA" else image
    image.save(tmp_path / "a.png", icc_profile=icc.grey_profile(np.square))
    wanted = np.rint(255 * icc.srgb_encode((grey / 255) ** 2))
    assert np.abs(wanted - grey).max() > 5
    np.testing.assert_allclose(images.read_image(tmp_path / "a.png"), wanted[..., None].repeat(3, -1), atol=1)


def test_a_grey_picture_may_have_a_profile_of_rgb(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "a.png", icc_profile=icc.rgb_profile(icc.ADOBE_RGB, icc.gamma_2_2))
    wanted = icc.in_srgb(grey[..., None].repeat(3, -1), icc.ADOBE_RGB, icc.gamma_2_2)
    np.testing.assert_allclose(images.read_image(tmp_path / "a.png"), wanted, atol=2)


def test_cmyk_profiles_say_what_the_inks_look_like(tmp_path):
    def lab(c, m, y, k):
        return (100 - 60 * k - 10 * (c + m + y), 0, 0)  # greys: the black ink alone is L = 40

    path = tmp_path / "a.tiff"
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, 16:, 0] = 255
    Image.fromarray(inks, "CMYK").save(path, icc_profile=icc.cmyk_profile(lab))
    found = images.read_image(path)
    assert (found[:, :16] == 255).all()
    ((low, high),) = {(pixel.min(), pixel.max()) for pixel in found[:, 16:].reshape(-1, 3)}
    assert high - low <= 2
    assert 200 < low < 235  # L = 90 is 226; Pillow's own formula has cyan, (0, 255, 255)


def test_transparency_is_flattened_over_the_white_of_srgb(tmp_path):
    pixels = np.full((16, 16, 4), (200, 40, 40, 255), np.uint8)
    pixels[:8, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=icc.rgb_profile(*SPACES["Display P3"]))
    found = images.read_image(tmp_path / "a.png")
    assert (found[:8] == 255).all()
    np.testing.assert_allclose(found[8:], icc.in_srgb(pixels[8:, :, :3], *SPACES["Display P3"]), atol=2)


def test_masks_are_not_converted(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(mask).save(tmp_path / "a.png", icc_profile=icc.grey_profile(np.square))
    np.testing.assert_array_equal(masks.read_mask(tmp_path / "a.png"), mask / np.float32(255))


@pytest.mark.parametrize(("profile", "problem"), [
    (b"not a profile", "cannot be used"),
    (icc.rgb_profile(icc.DISPLAY_P3, icc.srgb_decode)[:300], "cannot be used"),
    (icc.grey_profile(np.square), "of L samples, and the picture's are RGB"),
])  # fmt: skip
def test_a_profile_that_cannot_be_used_is_left_out_with_a_warning(tmp_path, colours, caplog, profile, problem):
    Image.fromarray(colours).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), colours)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'a.png'}: the colour profile ")
    assert problem in record.getMessage()


def test_pictures_from_memory_have_their_profiles_too(colours):
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG", icc_profile=icc.rgb_profile(*SPACES["Adobe RGB"]))
    found = images.as_rgb(images.open_image(file, "a"), "a")
    np.testing.assert_allclose(found, icc.in_srgb(colours, *SPACES["Adobe RGB"]), atol=2)


def test_adobe_rgb_that_only_the_camera_tells_of_is_a_warning(tmp_path, colours, caplog):
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.IFD.Interop: {1: "R03"}}
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), colours)
    assert "a.png: the camera says Adobe RGB" in caplog.text
