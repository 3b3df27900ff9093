"""Pictures are read as what a person sees, or refused with the reason; sizes follow diffusers."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rcgrpo_jax.data import images, masks
from rcgrpo_jax.errors import UsageError, UserError


@pytest.fixture
def picture() -> np.ndarray:
    """A 20 x 30 picture whose every pixel differs, so that a flip or a swapped channel shows."""
    y, x = np.mgrid[:20, :30]
    return np.stack([y * 12, x * 8, (x + y) * 5], axis=-1).astype(np.uint8)


def png_16_bit(samples: np.ndarray) -> bytes:
    """Encodes 16-bit grey `[H, W, 1]` or RGB `[H, W, 3]`; Pillow itself cannot write the latter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def refusal(path, read=images.read_image) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in caught.value.problem
    assert len(str(caught.value).splitlines()) == 2
    return caught.value


def test_saved_image_comes_back_bit_for_bit(tmp_path, picture):
    path = tmp_path / "new folder" / "a.png"
    images.save_image(path, picture)
    found = images.read_image(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, picture)


def test_save_refuses_other_suffixes_and_unwritable_places(tmp_path, picture):
    with pytest.raises(UserError, match=r"'\.jpg'.*'\.png' was wanted"):
        images.save_image(tmp_path / "a.jpg", picture)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        images.save_image(tmp_path / "file" / "a.png", picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, picture, orientation):
    upright = Image.fromarray(picture)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), picture)
    luminance = np.asarray(upright.convert("L"), np.float32) / 255
    stored.convert("L").save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(masks.read_mask(tmp_path / "a.png"), luminance)


def test_alpha_is_flattened_over_white(tmp_path, picture):
    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:10] = 0
    alpha[10] = 128
    Image.fromarray(np.concatenate([picture, alpha], axis=-1)).save(tmp_path / "a.png")
    found = images.read_image(tmp_path / "a.png")
    assert (found[:10] == 255).all()
    np.testing.assert_allclose(found[10], (picture[10] * 128.0 + 255 * 127) / 255, atol=1)
    np.testing.assert_array_equal(found[11:], picture[11:])


def test_palette_transparency_is_flattened_over_white(tmp_path):
    image = Image.new("P", (30, 20), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 30, 10))
    image.save(tmp_path / "a.png", transparency=0)
    found = images.read_image(tmp_path / "a.png")
    assert (found[:10] == [200, 100, 50]).all()
    assert (found[10:] == 255).all()


def test_transparency_of_16_bit_grey_is_kept(tmp_path):
    grey = np.full((20, 30), 7, np.uint16)
    grey[:10] = 65535 // 2
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=7)
    found = images.read_image(tmp_path / "a.png")
    assert (found[:10] == 127).all()
    assert (found[10:] == 255).all()
    assert "transparent" in refusal(tmp_path / "a.png", masks.read_mask).problem


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_spans_the_whole_8_bit_range(tmp_path, suffix):
    grey = np.linspace(0, 65535, 600).round().astype(np.uint16).reshape(20, 30)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(grey).save(path)
    found = images.read_image(path)
    assert found.shape == (20, 30, 3)
    np.testing.assert_array_equal(found[..., 0], np.round(grey / 257.0))
    np.testing.assert_allclose(masks.read_mask(path), grey / 65535.0, atol=0.5 / 255 + 1e-6)


def test_16_bit_colour_keeps_its_high_byte(tmp_path, picture):
    (tmp_path / "a.png").write_bytes(png_16_bit(picture.astype(np.uint16) * 256 + 77))
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), picture)


def test_wider_samples_than_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((20, 30), 70000, np.int32)).save(tmp_path / "i.tiff")
    assert "70000" in refusal(tmp_path / "i.tiff").problem
    Image.fromarray(np.full((20, 30), 0.5, np.float32)).save(tmp_path / "f.tiff")
    assert "mode 'F'" in refusal(tmp_path / "f.tiff").problem


@pytest.mark.parametrize(("mode", "colour", "wanted"), [
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
])  # fmt: skip
def test_other_modes_become_rgb(tmp_path, mode, colour, wanted):
    Image.new(mode, (30, 20), colour).save(tmp_path / "a.tiff")
    assert (images.read_image(tmp_path / "a.tiff") == wanted).all()


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    np.testing.assert_allclose(images.read_image(tmp_path / "a.jpg")[16, 16], (255, 0, 0), atol=3)


def test_palette_becomes_rgb(tmp_path, picture):
    quantised = Image.fromarray(picture).quantize(16)
    quantised.save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), np.asarray(quantised.convert("RGB")))


def test_one_pixel_can_be_read(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png").tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("read", [images.read_image, masks.read_mask])
def test_unreadable_files_are_refused_with_the_reason(tmp_path, picture, read):
    assert "no such file" in refusal(tmp_path / "none.png", read).problem
    (tmp_path / "text.png").write_text("not an image")
    assert "not an image" in refusal(tmp_path / "text.png", read).problem
    (tmp_path / "empty.png").touch()
    assert "this is an empty file; a whole PNG" in refusal(tmp_path / "empty.png", read).problem
    assert "cannot be read" in refusal(tmp_path, read).problem


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "a whole image was wanted" in refusal(path).problem


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_bytes_never_escape_as_another_error(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "tiff", "gif", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(picture).save(path, **({} if suffix == "gif" else {"exif": exif}))
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, len(damaged), 8)] = rng.integers(0, 256, 8, np.uint8)
            path.write_bytes(damaged.tobytes())
            with contextlib.suppress(UserError):
                images.read_image(path)


def test_decompression_bombs_are_refused(tmp_path, picture, monkeypatch):
    images.save_image(tmp_path / "a.png", picture)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 30 // 2 - 1)
    assert "more than 598 pixels" in refusal(tmp_path / "a.png").problem


def test_mask_polarity_says_which_colour_is_the_region(tmp_path):
    left = np.zeros((20, 30), np.uint8)
    left[:, :10] = 255
    left[0, 29] = 51
    Image.fromarray(left).save(tmp_path / "a.png")
    white, black = masks.read_mask(tmp_path / "a.png"), masks.read_mask(tmp_path / "a.png", "black")
    assert white.dtype == black.dtype == np.float32
    assert (white[:, :10] == 1).all()
    assert (white[1:, 10:] == 0).all()
    assert white[0, 29] == np.float32(0.2)
    np.testing.assert_array_equal(black, 1 - white)
    with pytest.raises(UsageError, match="'grey' found; 'white' or 'black'"):
        masks.read_mask(tmp_path / "a.png", "grey")


def test_mask_may_have_an_alpha_channel_only_if_it_is_opaque(tmp_path):
    Image.new("RGBA", (30, 20), (255, 255, 255, 255)).save(tmp_path / "a.png")
    assert (masks.read_mask(tmp_path / "a.png") == 1).all()
    Image.new("RGBA", (30, 20), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert "transparent" in refusal(tmp_path / "a.png", masks.read_mask).problem


def test_resizing_keeps_constants_and_mask_values(picture):
    assert (images.resize_image(np.full((20, 30, 3), 9, np.uint8), (50, 40)) == 9).all()
    assert images.resize_image(picture, (40, 16)).shape == (40, 16, 3)
    mask = np.zeros((4, 6), np.float32)
    mask[1:3, 2:5] = 0.3
    np.testing.assert_array_equal(images.resize_mask(mask, (8, 12)), mask.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("size", [(16, 16), (7, 30), (64, 5)])
def test_a_stroke_of_one_pixel_survives_any_resizing(size):
    for pixel in (0, 1, 30, 63):
        mask = np.zeros((64, 64), np.float32)
        mask[pixel, :] = 0.5
        small = images.resize_mask(mask, size)
        assert small.shape == size
        assert set(np.unique(small)) == {0, 0.5}
        assert (small.max(axis=0) == 0.5).all()


def test_kontext_sizes_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux_kontext")
    assert list(images.KONTEXT_SIZES) == diffusers.PREFERRED_KONTEXT_RESOLUTIONS


@pytest.mark.parametrize(("size", "wanted"), [
    ((512, 512), (1024, 1024)),
    ((1080, 1920), (752, 1392)),  # 16:9 is 1.778: 1392 / 752 = 1.851 is nearer than 1328 / 800 = 1.66
    ((1920, 1080), (1392, 752)),
    ((1000, 1935), (752, 1392)),  # by height / width it would be 1456 x 720
    ((100, 10000), (672, 1568)),
])  # fmt: skip
def test_kontext_size_has_the_nearest_aspect_ratio(size, wanted):
    assert images.kontext_size(*size) == wanted
