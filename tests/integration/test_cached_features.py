"""Images whose features are cached are recognized by their files, and neither opened nor decoded."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmtrain.data.geometry import Geometry
from vlmtrain.data.images import ImageFolder, ImageInFile, ImageInMemory, ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import BadSample, Conversation, Turn
from vlmtrain.data.video import FrameSequence, VideoFolder
from vlmtrain.data.video_plan import VideoPlan
from vlmtrain.model.vision import build_vision
from vlmtrain.training.feature_cache import FeatureCache

from ..media import draw_frames
from .test_feature_cache import VISION

YEAR_2001 = 10**18  # in nanoseconds
LOOK = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "tokens": 4, "patch_size": (8, 8)}
SQUASHED = Geometry((16, 16), "squash", **LOOK)
TWO_FRAMES = VideoPlan(fps=None, frames=2, sampling="uniform", fit="squash", tokens=4)
GEOMETRIES = {
    "squash": SQUASHED,
    "tiles": Geometry((16, 16), "tiles", **LOOK, grid=(2, 2), tile_grids=((1, 2), (2, 1))),
    "native": Geometry(
        (16, 16),
        "native",
        **LOOK,
        image_pixels=(256, 1024),
        connector={"name": "linear", "in_dim": 24, "out_dim": 8},
    ),
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_vision("open_clip", model_config=VISION, layer=-1, levels=[1, 2]).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images of different shapes, last modified long ago."""
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(40, 20, 3), (20, 40, 3), (24, 24, 3)]):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 256, size, np.uint8))
        image.save(tmp_path / "images" / f"{number}.png")
        date(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def date(file: Path, nanoseconds: int = YEAR_2001) -> None:
    os.utime(file, ns=(nanoseconds, nanoseconds))


def spoil(folder: Path) -> None:
    """Replace the bytes of all images, but neither their sizes nor their dates."""
    for file in folder.iterdir():
        spoil_file(file)


def spoil_file(file: Path) -> None:
    size, modified = file.stat().st_size, file.stat().st_mtime_ns
    file.write_bytes(bytes(size))
    date(file, modified)


class Reader:
    """A processor that reads a cache as the workers of a stage do, and the cache as its trainer uses it."""

    def __init__(self, root: Path, encoder, tokenizer, geometry: Geometry = SQUASHED):
        self.cache = FeatureCache(root, encoder, "weights", 10**9)
        self.plain = Processor(tokenizer, geometry, "chat", max_length=300)
        self.processor = self.plain.reading(self.cache.files)

    def batch(self, *images, processor: Processor | None = None):
        turns = Turn("user", "<image>What?"), Turn("assistant", "red")
        processor = processor or self.processor
        samples = [processor(Conversation("x", turns, (image,))) for image in images]
        return processor.collate(samples).to(torch.device("cpu")).visual

    @torch.no_grad()
    def features(self, *images):
        visual = self.batch(*images)
        return self.cache(visual.pixels[0], visual.cached[0])

    @torch.no_grad()
    def computed(self, *images):
        return self.cache.encoder.encode(self.batch(*images, processor=self.plain).pixels[0])


def images(folder: Path, *numbers: int):
    source = ImageFolder(folder)
    return [source.read(f"{number}.png", "", "x") for number in numbers or range(3)]


def assert_equal(found, expected) -> None:
    assert found.grids == expected.grids
    tensors = zip((found.patches, found.prefix, *found.levels), (expected.patches, expected.prefix, *expected.levels))
    assert all(one.equal(other) for one, other in tensors)


@pytest.mark.parametrize("fit", GEOMETRIES)
def test_features_that_are_read_with_a_batch_equal_computed_ones(tmp_path, folder, encoder, tokenizer, fit):
    """All of them, none, or some."""
    reader = Reader(tmp_path / "cache", encoder, tokenizer, GEOMETRIES[fit])
    first, second, third = images(folder)
    assert_equal(reader.features(second), reader.computed(second))
    assert_equal(reader.features(first, second, third), reader.computed(first, second, third))
    visual = reader.batch(first, second, third)
    assert len(visual.cached[0].numbers) == len(visual.items) and len(visual.pixels[0]) == 0
    assert_equal(reader.features(first, second, third), reader.computed(first, second, third))


@pytest.mark.parametrize("moved", [False, True])
def test_an_image_with_cached_features_is_not_read(tmp_path, folder, encoder, tokenizer, moved):
    expected = Reader(tmp_path / "cache", encoder, tokenizer).features(*images(folder))
    spoil(folder)
    if moved:
        folder = folder.rename(tmp_path / "elsewhere")
    assert_equal(Reader(tmp_path / "cache", encoder, tokenizer).features(*images(folder)), expected)


def other_date(folder: Path) -> None:
    date(folder / "0.png", YEAR_2001 + 1)


def other_size(folder: Path) -> None:
    file = folder / "0.png"
    file.write_bytes(file.read_bytes()[:-1])
    date(file)


def other_name(folder: Path) -> None:
    (folder / "1.png").rename(folder / "0.png")


def no_features(folder: Path) -> None:
    for file in folder.parent.rglob("*.safetensors"):
        file.unlink()


def damaged_features(folder: Path) -> None:
    for file in folder.parent.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])


def damaged_keys(folder: Path) -> None:
    for file in (folder.parent / "cache" / "keys").glob("*/*"):
        file.write_bytes(b"../../\xff")


@pytest.mark.parametrize("change", [other_date, other_size, other_name, no_features, damaged_features, damaged_keys])
def test_another_file_or_a_damaged_cache_is_decoded(tmp_path, folder, encoder, tokenizer, change):
    reader = Reader(tmp_path / "cache", encoder, tokenizer)
    reader.features(*images(folder))
    spoil(folder)
    change(folder)
    with pytest.raises(BadSample, match=r"image .*0\.png is not an image"):
        reader.features(*images(folder, 0))


@pytest.mark.parametrize("modified", [0, 315_532_800 * 10**9, None])
def test_a_date_that_says_nothing_is_not_trusted(tmp_path, folder, encoder, tokenizer, modified):
    """Of a file that was just written, or that is a member of a reproducible archive."""
    for file in folder.iterdir():
        date(file, time.time_ns() if modified is None else modified)
    reader = Reader(tmp_path / "cache", encoder, tokenizer)
    reader.features(*images(folder))
    spoil(folder)
    with pytest.raises(BadSample):
        reader.features(*images(folder))


def test_another_view_of_an_image_has_other_features(tmp_path, folder, encoder, tokenizer):
    Reader(tmp_path / "cache", encoder, tokenizer).features(*images(folder))
    for change in ({"fit": "pad"}, {"mean": (0.5,) * 3}, {"std": (0.5,) * 3}):
        other = Reader(tmp_path / "cache", encoder, tokenizer, replace(SQUASHED, **change))
        assert_equal(other.features(*images(folder)), other.computed(*images(folder)))
        assert other.cache.misses == 3 - ("fit" in change)  # a square image is not padded


def test_members_of_shards_and_encoded_images_are_not_decoded(tmp_path, folder, encoder, tokenizer, monkeypatch):
    shard = tmp_path / "shard.tar"
    data = [(folder / f"{number}.png").read_bytes() for number in range(3)]
    shard.write_bytes(b"".join(data))
    date(shard)
    inside = [ImageInFile(shard, 0, len(data[0]), "0"), ImageInFile(shard, len(data[0]), len(data[1]), "1")]
    memory = ImageInMemory(data[2], "2")
    reader = Reader(tmp_path / "cache", encoder, tokenizer)
    expected = reader.features(*inside, memory)
    assert_equal(expected, reader.computed(*images(folder)))
    shutil.rmtree(folder)
    shard.write_bytes(bytes(shard.stat().st_size))
    date(shard)
    monkeypatch.setattr(Image, "open", None)
    assert_equal(reader.features(*inside, memory), expected)


def test_a_video_with_cached_features_is_not_opened(tmp_path, encoder, tokenizer, monkeypatch):
    """Another clip of it, whose frames have the same times, is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "index"))
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", 10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(20):
            gray = np.full((32, 32, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(stream.encode())
    date(tmp_path / "clip.mp4")
    clips = [VideoFolder(tmp_path).read("clip.mp4", "", "x", start, start + 1) for start in (0, 1)]
    reader = Reader(tmp_path / "cache", encoder, tokenizer, replace(SQUASHED, video=TWO_FRAMES))
    first = reader.features(clips[0])
    assert_equal(first, reader.computed(clips[0]))
    assert_equal(reader.features(clips[1]), reader.computed(clips[1]))
    spoil_file(tmp_path / "clip.mp4")
    assert_equal(reader.features(clips[0]), first)


@pytest.fixture
def frames(tmp_path) -> Path:
    """A folder of four frames, last modified long ago."""
    folder = draw_frames(tmp_path / "frames", 4)
    for number in range(4):
        date(folder / f"{number}.png", YEAR_2001 + 10**9 * number)
    return folder


def shown_frames(folder: Path, numbers: tuple[int, ...] | None = None, times: tuple = (None, None), fps: float = 2.0):
    """The video of a folder of frames, or of a list of some of them."""
    value = folder.name if numbers is None else [f"{folder.name}/{number}.png" for number in numbers]
    return VideoFolder(folder.parent, fps).read(value, "", "x", *times)


@pytest.mark.parametrize("numbers", [None, (0, 1, 2, 3), (3, 1, 2)], ids=["folder", "list", "list out of order"])
def test_frames_with_cached_features_are_not_decoded(tmp_path, frames, encoder, tokenizer, monkeypatch, numbers):
    reader = Reader(tmp_path / "cache", encoder, tokenizer, replace(SQUASHED, video=TWO_FRAMES))
    video = shown_frames(frames, numbers)
    first = reader.features(video)
    assert_equal(first, reader.computed(video))
    moved = frames.parent / "moved"
    shutil.move(frames, moved / "frames")
    monkeypatch.setattr(FrameSequence, "frames", None)
    assert_equal(reader.features(shown_frames(moved / "frames", numbers)), first)


CHANGES = {
    "pixels of a frame that is shown": lambda folder: repaint(folder / "3.png"),
    "date of a frame that is not shown": lambda folder: date(folder / "1.png", YEAR_2001 + 1),
    "one more": lambda folder: shutil.copy2(folder / "3.png", folder / "4.png"),
    "one less": lambda folder: (folder / "1.png").unlink(),
    "names exchanged": lambda folder: [(folder / a).rename(folder / b) for a, b in (
        ("0.png", "x"), ("3.png", "0.png"), ("x", "3.png"))],
    "still being written": lambda folder: (folder / "1.png").touch(),
}  # fmt: skip


def repaint(file: Path) -> None:
    Image.new("RGB", (48, 48), (1, 2, 3)).save(file)
    date(file, YEAR_2001 + 1)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_frames_are_decoded_again(tmp_path, frames, encoder, tokenizer, change):
    reader = Reader(tmp_path / "cache", encoder, tokenizer, replace(SQUASHED, video=TWO_FRAMES))
    reader.features(shown_frames(frames))
    CHANGES[change](frames)
    decoded = count_decoded(reader, shown_frames(frames))
    assert decoded == 2 and count_decoded(reader, shown_frames(frames)) == (2 if change == "still being written" else 0)
    assert_equal(reader.features(shown_frames(frames)), reader.computed(shown_frames(frames)))


@pytest.mark.parametrize("other", [{"numbers": (3, 2, 1, 0)}, {"times": (0.5, None)}, {"fps": 4.0}])
def test_other_videos_of_the_same_frames_are_decoded(tmp_path, frames, encoder, tokenizer, other):
    reader = Reader(tmp_path / "cache", encoder, tokenizer, replace(SQUASHED, video=TWO_FRAMES))
    reader.features(shown_frames(frames, (0, 1, 2, 3)))
    video = shown_frames(frames, **{"numbers": (0, 1, 2, 3), **other})
    assert count_decoded(reader, video) == 2
    assert_equal(reader.features(video), reader.computed(video))


def count_decoded(reader: Reader, video: FrameSequence) -> int:
    decoded = []
    with pytest.MonkeyPatch.context() as patched:
        load = ImageOnDisk.load
        patched.setattr(ImageOnDisk, "load", lambda self: decoded.append(self) or load(self))
        reader.features(video)
    return len(decoded)


def test_a_cache_without_keys_of_files_is_read(tmp_path, folder, encoder, tokenizer):
    """As earlier versions wrote it: images are decoded once, and their features are found."""
    reader = Reader(tmp_path / "cache", encoder, tokenizer)
    expected = reader.features(*images(folder))
    shutil.rmtree(tmp_path / "cache" / "keys")
    assert_equal(reader.features(*images(folder)), expected)
    assert (reader.cache.hits, reader.cache.misses) == (3, 3)
    spoil(folder)
    assert_equal(reader.features(*images(folder)), expected)
