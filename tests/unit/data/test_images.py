"""Pictures: what any file becomes as RGB, how it is fitted, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from vlmtrain.data.images import ImageOnDisk, fit_image, to_tensor
from vlmtrain.data.records import BadSample

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def quadrants(width: int = 40, height: int = 20) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Top left, top right, bottom left, bottom right."""
    x, y = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (x, 0), (0, y), (x, y))]


def noise(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


# fitting


def test_squash_stretches_the_whole_picture():
    fitted = fit_image(quadrants(), (16, 16), "squash", MEAN)
    assert fitted.size == (16, 16)
    assert corners(fitted) == [RED, GREEN, BLUE, WHITE]
    assert (pixels(fitted)[:6, :6] == RED).all() and (pixels(fitted)[10:, 10:] == WHITE).all()


@pytest.mark.parametrize("wide", [True, False])
def test_pad_keeps_the_aspect_and_fills_with_the_mean_color(wide):
    size = (40, 20) if wide else (20, 40)
    fitted = pixels(fit_image(Image.new("RGB", size, RED), (16, 16), "pad", MEAN))
    fitted = fitted if wide else fitted.transpose(1, 0, 2)
    assert (fitted[4:12] == RED).all()
    fill = [round(255 * channel) for channel in MEAN]
    assert (fitted[:4] == fill).all() and (fitted[12:] == fill).all()


def test_padding_is_nearly_zero_once_normalised():
    fitted = to_tensor(fit_image(Image.new("RGB", (40, 20), RED), (16, 16), "pad", MEAN), MEAN, STD)
    assert fitted[:, 0].abs().max() < 0.5 / 255 / min(STD) + 1e-6


def test_crop_keeps_the_centre_and_the_aspect():
    image = Image.new("RGB", (80, 20), RED)
    image.paste(GREEN, (30, 0, 50, 20))
    assert (pixels(fit_image(image, (20, 20), "crop", MEAN)) == GREEN).all()
    circle = np.hypot(*np.mgrid[-20:20, -40:40] + 0.5) < 16
    fitted = pixels(fit_image(Image.fromarray(np.uint8(circle) * 255).convert("RGB"), (20, 20), "crop", MEAN))[..., 0]
    inside = fitted > 127
    assert inside.any(0).sum() == inside.any(1).sum() == 16


def test_size_is_height_then_width_for_every_fit():
    for fit in ("squash", "pad", "crop"):
        assert fit_image(noise(50, 70), (12, 30), fit, MEAN).size == (30, 12)


def test_a_picture_of_the_right_size_is_left_alone():
    for fit in ("squash", "pad", "crop"):
        assert (pixels(fit_image(noise(30, 12), (12, 30), fit, MEAN)) == pixels(noise(30, 12))).all()


def test_normalisation_equals_torchvision():
    image = noise(9, 7)
    reference = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(image)
    torch.testing.assert_close(to_tensor(image, MEAN, STD), torch.Tensor(reference), rtol=0, atol=1e-6)


# decoding


def load(path: Path, image: Image.Image, **options) -> Image.Image:
    image.save(path, **options)
    return ImageOnDisk(path).load()


@pytest.mark.parametrize(
    "orientation, expected",
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (8, [GREEN, WHITE, RED, BLUE]),
    ],
)
def test_exif_orientation_is_applied(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load(tmp_path / "image.png", quadrants(), exif=exif)
    assert loaded.size == ((20, 40) if orientation > 4 else (40, 20))
    assert corners(loaded) == expected


def test_transparent_pixels_become_white(tmp_path):
    rgba = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    rgba.putpixel((2, 0), (0, 0, 0, 51))
    assert pixels(load(tmp_path / "rgba.png", rgba))[0].tolist()[:3] == [[255] * 3, [10, 20, 30], [204] * 3]
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (90, 255))
    assert pixels(load(tmp_path / "la.png", grey))[0].tolist() == [[255] * 3, [90] * 3]


def test_palette_with_a_transparent_color(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert pixels(load(tmp_path / "plain.png", image))[0].tolist() == [list(RED), list(GREEN)]
    assert pixels(load(tmp_path / "clear.png", image, transparency=0))[0].tolist() == [list(WHITE), list(GREEN)]
    assert pixels(load(tmp_path / "clear.gif", image, transparency=0))[0].tolist() == [list(WHITE), list(GREEN)]


def test_a_transparent_color_without_an_alpha_channel(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert pixels(load(tmp_path / "rgb.png", image, transparency=(1, 2, 3)))[0].tolist() == [list(WHITE), [9, 9, 9]]


def test_cmyk_becomes_rgb(tmp_path):
    loaded = load(tmp_path / "image.tif", Image.new("CMYK", (8, 8), (255, 0, 255, 0)))
    assert loaded.getpixel((4, 4)) == GREEN
    jpeg = load(tmp_path / "image.jpg", Image.new("CMYK", (8, 8), (255, 0, 255, 0)))
    assert np.abs(np.subtract(jpeg.getpixel((4, 4)), GREEN)).max() < 6


@pytest.mark.parametrize("suffix, dtype", [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<u2")])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix, dtype):
    values = np.array([[0, 255, 256, 1000, 32768, 65535]], dtype)
    loaded = pixels(load(tmp_path / f"image.{suffix}", Image.fromarray(values)))
    assert loaded[0].tolist() == [[v // 256] * 3 for v in values[0].tolist()]


def test_16_bit_grey_is_scaled_with_a_transparent_color_too(tmp_path):
    values = np.array([[1000, 32768, 65535]], np.uint16)
    loaded = pixels(load(tmp_path / "image.png", Image.fromarray(values), transparency=5))
    assert loaded[0].tolist() == [[3] * 3, [128] * 3, [255] * 3]


def test_a_bitmap_of_two_colors(tmp_path):
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(load(tmp_path / "image.png", image))[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("values", [np.full((2, 2), 70_000, np.int32), np.full((2, 2), 0.5, np.float32)])
def test_pixels_without_a_known_range_are_refused(tmp_path, values):
    with pytest.raises(BadSample, match=r"image\.tif cannot be decoded: grey values"):
        load(tmp_path / "image.tif", Image.fromarray(values))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 4), color) for color in (RED, GREEN, BLUE)]
    for suffix in ("gif", "png", "webp"):
        options = {"lossless": True} if suffix == "webp" else {}
        loaded = load(tmp_path / f"image.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
        assert (pixels(loaded) == RED).all(), suffix


# refusing


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"image.{suffix}"
    noise().save(path)
    whole = path.read_bytes()
    ImageOnDisk(path).check()
    path.write_bytes(whole[: int(share * len(whole))])
    for look in (ImageOnDisk(path).load, ImageOnDisk(path).check):
        with pytest.raises(BadSample, match=rf"image\.{suffix}"):
            look()


def test_a_file_damaged_inside_is_refused_when_it_is_loaded(tmp_path):
    path = tmp_path / "image.png"
    noise().save(path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(BadSample, match=r"image\.png cannot be decoded"):
        ImageOnDisk(path).load()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_data_behind_the_picture_do_no_harm(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    noise().save(path)
    path.write_bytes(path.read_bytes() + b"a camera's own data" * 20)
    ImageOnDisk(path).check()
    assert ImageOnDisk(path).load().size == (64, 64)


@pytest.mark.parametrize("name", ["missing.png", "", "half\0.png", "text.png", "lone\ud800.png", "n" * 300])
def test_what_is_no_picture_is_refused(tmp_path, name):
    (tmp_path / "text.png").write_text("not a picture")
    for look in (ImageOnDisk(tmp_path / name).load, ImageOnDisk(tmp_path / name).check):
        with pytest.raises(BadSample, match="image"):
            look()


def test_a_picture_too_large_to_decode_is_refused_by_its_header(tmp_path, monkeypatch):
    noise().save(tmp_path / "image.png")
    monkeypatch.setattr("vlmtrain.data.images.MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(BadSample, match="64x64 pixels: too many"):
        ImageOnDisk(tmp_path / "image.png").load()
