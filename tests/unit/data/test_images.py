"""Images: conversion of all kinds of files to RGB, fitting, and rejected files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features
from torchvision.transforms import v2
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from vlmtrain.data import images
from vlmtrain.data.encoded import MAX_ASPECT, MAX_SIDE
from vlmtrain.data.images import ImageInFile, ImageInMemory, ImageOnDisk, fit_image
from vlmtrain.data.records import BadSample
from vlmtrain.visual import normalized

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def shown(image: Image.Image) -> torch.Tensor:
    return normalized(torch.tensor(pixels(image)).permute(2, 0, 1), MEAN, STD)


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


def test_squash_stretches_the_whole_image():
    fitted = fit_image(quadrants(), (16, 16), "squash", MEAN)
    assert fitted.size == (16, 16)
    assert corners(fitted) == [RED, GREEN, BLUE, WHITE]
    assert (pixels(fitted)[:6, :6] == RED).all() and (pixels(fitted)[10:, 10:] == WHITE).all()


@pytest.mark.parametrize("wide", [True, False])
def test_pad_keeps_the_aspect_and_fills_with_the_mean_color(wide):
    size = (40, 20) if wide else (20, 40)
    fitted = pixels(fit_image(Image.new("RGB", size, RED), (16, 16), "pad", MEAN))
    fitted = fitted if wide else fitted.transpose(1, 0, 2)
    assert (fitted[6:10] == RED).all()
    fill = [int(255 * channel) for channel in MEAN]
    assert (fitted[:2] == fill).all() and (fitted[14:] == fill).all()


def test_padding_is_nearly_zero_once_normalized():
    fitted = fit_image(Image.new("RGB", (40, 20), RED), (16, 16), "pad", MEAN)
    assert shown(fitted)[:, 0].abs().max() < 1 / 255 / min(STD) + 1e-6


@pytest.mark.parametrize("side", [16, 50, 336])
def test_pad_equals_llavas_processor(side):
    library = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": side},
        do_center_crop=False,
        do_rescale=False,
        do_normalize=False,
        image_mean=MEAN,
        resample=Image.Resampling.BICUBIC,
    )
    random = np.random.default_rng(1)
    for width, height in [(500, 375), (375, 500), (640, 427), *random.integers(1, 90, (40, 2)).tolist()]:
        theirs = library(noise(width, height), return_tensors="np").pixel_values[0].transpose(1, 2, 0)
        assert (pixels(fit_image(noise(width, height), (side, side), "pad", MEAN)) == theirs).all(), (width, height)


@pytest.mark.parametrize("size", [(70, 33), (33, 70), (200, 1), (1, 200)])
def test_pad_scales_a_canvas_of_the_targets_aspect(size, monkeypatch):
    monkeypatch.setattr(images, "BAND_PIXELS", 1000)
    width, height = size
    whole = max(width, round(height * 30 / 12)), max(height, round(width * 12 / 30))
    canvas = Image.new("RGB", whole, tuple(int(255 * channel) for channel in MEAN))
    canvas.paste(noise(*size), ((whole[0] - width) // 2, (whole[1] - height) // 2))
    expected = canvas.resize((30, 12), Image.Resampling.BICUBIC)
    assert (pixels(fit_image(noise(*size), (12, 30), "pad", MEAN)) == pixels(expected)).all()


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_the_thinnest_image_that_is_accepted_is_still_visible(fit):
    for size in ((MAX_ASPECT, 1), (1, MAX_ASPECT)):
        fitted = pixels(fit_image(Image.new("RGB", size, RED), (16, 16), fit, MEAN))
        assert fitted.shape == (16, 16, 3)
        if fit == "pad":  # a twelfth of a row of pixels, which contributes to the average
            assert (fitted[..., 0] > int(255 * MEAN[0]) + 5).any() and (fitted[..., 0] < RED[0]).all()
        else:
            assert (fitted == RED).all(-1).any()


def test_crop_keeps_the_center_and_the_aspect():
    image = Image.new("RGB", (80, 20), RED)
    image.paste(GREEN, (30, 0, 50, 20))
    assert (pixels(fit_image(image, (20, 20), "crop", MEAN)) == GREEN).all()
    circle = np.hypot(*np.mgrid[-20:20, -40:40] + 0.5) < 16
    fitted = pixels(fit_image(Image.fromarray(np.uint8(circle) * 255).convert("RGB"), (20, 20), "crop", MEAN))[..., 0]
    inside = fitted > 127
    assert inside.any(0).sum() == inside.any(1).sum() == 16


@pytest.mark.parametrize("size", [(50, 33), (33, 50), (21, 90), (8, 8), (200, 199)])
def test_crop_equals_clips_processor(size):
    library = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_rescale=False, do_normalize=False
    )
    theirs = library(noise(*size), return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    assert (pixels(fit_image(noise(*size), (16, 16), "crop", MEAN)) == theirs).all()


def test_size_is_height_then_width_for_every_fit():
    for fit in ("squash", "pad", "crop"):
        assert fit_image(noise(50, 70), (12, 30), fit, MEAN).size == (30, 12)


def test_an_image_of_the_right_size_is_unchanged():
    for fit in ("squash", "pad", "crop"):
        assert (pixels(fit_image(noise(30, 12), (12, 30), fit, MEAN)) == pixels(noise(30, 12))).all()


def test_normalization_equals_torchvision():
    image = noise(9, 7)
    reference = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(image)
    torch.testing.assert_close(shown(image), torch.Tensor(reference), rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif"])
def test_every_orientation_is_undone(tmp_path, orientation, suffix):
    # the letter F, stored as by a camera in each of the eight orientations
    upright = np.zeros((48, 32), np.uint8)
    upright[8:40, 8:16] = upright[8:16, 8:24] = upright[20:28, 8:20] = 255
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: upright.T[::-1], 7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95}, "webp": {"lossless": True}, "tif": {}}[suffix]
    loaded = load(tmp_path / f"image.{suffix}", Image.fromarray(np.ascontiguousarray(stored)), exif=exif, **options)
    assert loaded.size == (32, 48)
    assert ((pixels(loaded)[..., 0] > 127) == (upright > 127)).all()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_broken_metadata_does_not_make_an_image_bad(tmp_path, exif, suffix):
    loaded = load(tmp_path / f"image.{suffix}", Image.new("RGB", (8, 8), RED), exif=exif)
    assert np.abs(pixels(loaded).astype(int) - RED).max() < 6


def test_transparent_pixels_become_white(tmp_path):
    rgba = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    rgba.putpixel((2, 0), (0, 0, 0, 51))
    assert pixels(load(tmp_path / "rgba.png", rgba))[0].tolist()[:3] == [[255] * 3, [10, 20, 30], [204] * 3]
    gray = Image.new("LA", (2, 1), (0, 0))
    gray.putpixel((1, 0), (90, 255))
    assert pixels(load(tmp_path / "la.png", gray))[0].tolist() == [[255] * 3, [90] * 3]


def test_palette_with_a_transparent_color(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert pixels(load(tmp_path / "plain.png", image))[0].tolist() == [list(RED), list(GREEN)]
    assert pixels(load(tmp_path / "clear.png", image, transparency=0))[0].tolist() == [list(WHITE), list(GREEN)]
    assert pixels(load(tmp_path / "clear.gif", image, transparency=0))[0].tolist() == [list(WHITE), list(GREEN)]


def test_palette_with_transparent_colors_of_several_degrees(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, 0, 0, 0])
    image.putdata([0, 1, 2])
    loaded = load(tmp_path / "image.png", image, transparency=bytes([255, 0, 51]))
    assert pixels(loaded)[0].tolist() == [list(RED), list(WHITE), [204] * 3]


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
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, suffix, dtype):
    values = np.array([[0, 255, 256, 1000, 32768, 65535]], dtype)
    loaded = pixels(load(tmp_path / f"image.{suffix}", Image.fromarray(values)))
    assert loaded[0].tolist() == [[v // 256] * 3 for v in values[0].tolist()]


def test_16_bit_gray_is_scaled_with_a_transparent_color_too(tmp_path):
    values = np.array([[1000, 32768, 65535]], np.uint16)
    loaded = pixels(load(tmp_path / "image.png", Image.fromarray(values), transparency=5))
    assert loaded[0].tolist() == [[3] * 3, [128] * 3, [255] * 3]


def png(color_type: int, depth: int, width: int, height: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file assembled by hand; `rows` include their filter bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    "color_type, depth, rows, expected",
    [
        (0, 1, b"\0\x40", [(0,) * 3, (255,) * 3]),
        (0, 2, b"\0\x60", [(85,) * 3, (170,) * 3]),
        (0, 4, b"\0\x1f", [(17,) * 3, (255,) * 3]),
        (0, 16, b"\0\x12\x34\xff\xff", [(0x12,) * 3, (255,) * 3]),
        (2, 16, b"\0\x12\x34\x56\x78\x9a\xbc" + b"\xff" * 6, [(0x12, 0x56, 0x9A), WHITE]),
        (4, 8, b"\0\x0a\xff\x0a\x00", [(10,) * 3, WHITE]),
        (4, 16, b"\0\x0a\x00\xff\xff\x0a\x00\x00\x00", [(10,) * 3, WHITE]),
        (6, 16, b"\0\x01\x00\x02\x00\x03\x00\xff\xff" + b"\0" * 8, [(1, 2, 3), WHITE]),
    ],
)
def test_png_of_every_depth(color_type, depth, rows, expected):
    loaded = ImageInMemory(png(color_type, depth, 2, 1, rows), "hand-made").load()
    assert [tuple(pixel) for pixel in pixels(loaded)[0].tolist()] == expected


def test_a_bitmap_of_two_colors(tmp_path):
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(load(tmp_path / "image.png", image))[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("values", [np.full((2, 2), 70_000, np.int32), np.full((2, 2), 0.5, np.float32)])
def test_pixels_without_a_known_range_are_refused(tmp_path, values):
    with pytest.raises(BadSample, match=r"image\.tif cannot be decoded: gray values"):
        load(tmp_path / "image.tif", Image.fromarray(values))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 4), color) for color in (RED, GREEN, BLUE)]
    for suffix in ("gif", "png", "webp", "tif"):
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
def test_data_after_the_image_does_no_harm(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    noise().save(path)
    path.write_bytes(path.read_bytes() + b"a camera's own data" * 20)
    ImageOnDisk(path).check()
    assert ImageOnDisk(path).load().size == (64, 64)


@pytest.mark.parametrize("name", ["missing.png", "", "half\0.png", "text.png", "lone\ud800.png", "n" * 300])
def test_a_file_that_is_not_an_image_is_refused(tmp_path, name):
    (tmp_path / "text.png").write_text("not a picture")
    for look in (ImageOnDisk(tmp_path / name).load, ImageOnDisk(tmp_path / name).check):
        with pytest.raises(BadSample, match="image"):
            look()


def encoded(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def everywhere(folder: Path, data: bytes) -> list:
    """The same bytes as a file, in memory, and within a larger file."""
    (folder / "image").write_bytes(data)
    (folder / "shard").write_bytes(b"before" + data + b"IEND behind \xff\xd9")
    inside = ImageInFile(folder / "shard", 6, len(data), "image")
    return [ImageOnDisk(folder / "image"), ImageInMemory(data, "image"), inside]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_an_image_is_the_same_wherever_it_is_stored(tmp_path, format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    options = {"lossless": True} if format == "WEBP" else {}
    image = Image.new("RGB", (20, 10), RED)
    data = encoded(image, format, **options)
    for picture in everywhere(tmp_path, data):
        picture.check()
        assert np.abs(pixels(picture.load()).astype(int) - RED).max() < 6
    for picture in everywhere(tmp_path, data[: len(data) * 2 // 3]):
        for look in (picture.load, picture.check):
            with pytest.raises(BadSample, match="image"):
                look()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is not an image: it is empty"),
        (b"not a picture", "is not an image: it starts with b'not a picture'"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 'is not an image: it starts with b"<svg'),
        (b"<!DOCTYPE html><p>404", "is not an image: it starts with b'<!DOCTYPE html>"),
        (b"%PDF-1.7 ...", "is not an image"),
        (b"\x89PNG\r\n\x1a\n", "cannot be|is not an image"),
        (b"\xff\xd8\xff\xd9", "cannot be|is not an image"),
        (png(2, 8, 0, 0, b""), "cannot be|is not an image"),
        (png(2, 8, 50_000, 50_000, b""), "cannot be decoded: .*(50000|2500000000)"),
        (png(2, 8, 2**31 - 1, 2**31 - 1, b""), "cannot be decoded"),
        (png(2, 8, 20_000, 6_000, b""), "20000x6000 pixels: too many"),
        (png(0, 8, 1, 50_000, b""), "1x50000 pixels: one side is more than 200 times the other"),
        (png(0, 8, 201, 1, b"\0" + b"\0" * 201), "201x1 pixels: one side is more than 200 times the other"),
        (png(0, 8, MAX_SIDE + 1, 400, b""), "65536x400 pixels: a side of more than 65535"),
    ],
)
def test_a_bad_image_is_refused_wherever_it_is_stored(tmp_path, data, message):
    for picture in everywhere(tmp_path, data):
        with pytest.raises(BadSample, match=message):
            picture.load()


def test_an_image_of_200_to_1_is_accepted():
    assert ImageInMemory(png(0, 8, 200, 1, b"\0" + b"\0" * 200), "thin").load().size == (200, 1)


def test_text_that_unpacks_to_much_is_refused():
    bomb = b"Comment\0\0" + zlib.compress(b"\0" * 80_000_000, 9)
    with pytest.raises(BadSample):
        ImageInMemory(png(0, 8, 1, 1, b"\0\0", (b"zTXt", bomb)), "bomb").load()
    assert PngImagePlugin.MAX_TEXT_CHUNK < 80_000_000


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    for program in ("gs", "gswin32c"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    noise(8, 8).save(tmp_path / "image.eps")
    with pytest.raises(OSError), Image.open(tmp_path / "image.eps") as image:
        image.load()
    (tmp_path / "started").unlink()  # without the restriction, Pillow starts the program
    for picture in everywhere(tmp_path, (tmp_path / "image.eps").read_bytes()):
        for look in (picture.load, picture.check):
            with pytest.raises(BadSample, match=r"is not an image: it starts with b'%!PS"):
                look()
    assert not (tmp_path / "started").exists()


def test_a_path_that_is_not_a_file_is_refused_without_waiting(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "folder.png", tmp_path / "pipe.png", Path("/dev/zero")):
        for look in (ImageOnDisk(path).load, ImageOnDisk(path).check):
            with pytest.raises(BadSample, match=f"image {path} cannot be read: it is not a regular file"):
                look()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_damaged_bytes_give_an_image_or_a_bad_sample_and_nothing_else(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    whole = encoded(noise(12, 9), format, **options)
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        damaged = bytearray(whole)
        for at in random.integers(0, min(len(whole), 400), random.integers(1, 6)):
            damaged[at] = random.integers(0, 256)
        try:
            assert ImageInMemory(bytes(damaged), "damaged").load().mode == "RGB"
            outcomes.add("picture")
        except BadSample:
            outcomes.add("bad")
    assert "bad" in outcomes


def test_cmyk_of_photographs_is_not_inverted(tmp_path):
    inks = np.stack(np.meshgrid([0, 128, 255], [0, 128, 255], [0, 128, 255], [0, 128], indexing="ij"), -1).reshape(
        -1, 4
    )
    for c, m, y, k in inks.tolist():
        data = encoded(Image.new("CMYK", (8, 8), (c, m, y, k)), "JPEG", quality=100)
        assert b"Adobe" in data
        expected = [(255 - ink) * (255 - k) / 255 for ink in (c, m, y)]
        assert np.abs(pixels(ImageInMemory(data, "cmyk").load()) - expected).max() < 4


def test_an_image_too_large_to_decode_is_refused_by_its_header(tmp_path, monkeypatch):
    noise().save(tmp_path / "image.png")
    monkeypatch.setattr("vlmtrain.data.encoded.MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(BadSample, match="64x64 pixels: too many"):
        ImageOnDisk(tmp_path / "image.png").load()
