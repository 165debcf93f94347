"""Videos that PyAV itself has written: each frame is gray, at five times its number."""

from __future__ import annotations

import os
import resource
import struct
import sys
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.records import BadSample
from vlmtrain.data.video import FrameSequence, VideoFolder, VideoInFile, VideoInMemory, VideoOnDisk

av = pytest.importorskip("av")
FRAMES, RATE, WIDTH, HEIGHT = 50, 10, 64, 48
CODECS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "ts": "libx264", "avi": "mpeg4", "gif": "gif"}


def gray(number: int) -> np.ndarray:
    """A frame whose left half tells its number; the right half is black."""
    frame = np.full((HEIGHT, WIDTH, 3), 5 * number, np.uint8)
    frame[:, WIDTH // 2 :] = 0
    return frame


def write(path: Path, frames: int = FRAMES, times: list[int] | None = None, rotation: int = 0, **options) -> Path:
    """Write a clip. times: of the frames, in hundredths of a second."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], RATE)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        if path.suffix in (".mp4", ".mkv", ".ts"):
            stream.options = {"g": "12", "bf": "2", "crf": "5"}
        if path.suffix == ".avi":
            stream.options = {"qmin": "1", "qmax": "1"}
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(gray(number), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for extension in CODECS:
        write(folder / f"clip.{extension}")
    return folder


def told(image: Image.Image) -> float:
    """The number that a frame tells."""
    pixels = np.asarray(image).astype(float)
    return pixels[:, : pixels.shape[1] // 3].mean() / 5


def shown(video, numbers) -> list[int]:
    return [round(told(frame)) for frame in video.frames(numbers)]


@pytest.mark.parametrize("extension", CODECS)
def test_times_and_frames(clips, extension):
    video = VideoOnDisk(clips / f"clip.{extension}")
    facts = video.probe()
    assert len(facts.times) == FRAMES and facts.size == (HEIGHT, WIDTH)
    np.testing.assert_allclose(facts.times, np.arange(FRAMES) / RATE, atol=2e-3)
    assert facts.duration == pytest.approx(FRAMES / RATE, abs=2e-3) and facts.rate == pytest.approx(RATE, rel=1e-3)
    for numbers in ([0], [49], [3, 4, 5, 30], [11, 12, 13, 48], range(50)):
        assert shown(video, list(numbers)) == list(numbers), extension


X264 = {"keyframes among B-frames": "keyint=3:min-keyint=1:bframes=2:open-gop=1", "no keyframes": "intra-refresh=1"}
ENCODINGS = {
    **{name: ("mp4", "libx264", {"x264-params": f"keyint=12:{params}"}) for name, params in X264.items()},
    "HEVC": ("mp4", "libx265", {"x265-params": "keyint=12:open-gop=1:bframes=3:log-level=none"}),
    "hidden frames": ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "30", "b": "2M"}),
    "AVI without presentation times": ("avi", "libx264", {"g": "12"}),
    "AVI with B-frames": ("avi", "mpeg4", {"g": "12", "bf": "2"}),
    "no index": ("mpg", "mpeg2video", {"g": "12", "bf": "2"}),
    **{extension: (extension, "libx264", {"g": "12", "bf": "2"}) for extension in ("ts", "flv", "mkv")},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_frames_equal_those_that_pyav_decodes_in_order(tmp_path, encoding):
    extension, codec, options = ENCODINGS[encoding]
    texture = np.random.default_rng(0).integers(0, 256, (HEIGHT * 2, WIDTH * 2, 3), np.uint8)
    frames = [np.roll(texture, 3 * number, 1) for number in range(FRAMES)]
    file = encode(tmp_path / f"clip.{extension}", frames, codec, options, rate=25)
    with av.open(str(file)) as container:
        expected = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
    video = VideoOnDisk(file)
    assert len(video.probe().times) == len(expected) == FRAMES
    np.testing.assert_allclose(video.probe().times, np.arange(FRAMES) / 25, atol=2e-3)
    for numbers in (range(FRAMES), [49], [13], [2, 11, 12, 40], [23, 24, 25, 37]):
        for number, frame in zip(numbers, video.frames(list(numbers)), strict=True):
            assert np.array_equal(frame, expected[number]), number


def encode(path: Path, frames, codec: str, options: dict[str, str], rate: int = RATE, first: int = 0, **muxing) -> Path:
    """Write frames as they are. first: number of the first one, from which its time follows."""
    with av.open(str(path), "w", options=muxing) as container:
        stream = container.add_stream(codec, rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for number, pixels in enumerate(frames, first):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


GRAY = [gray(number) for number in range(FRAMES)]


def test_times_start_at_the_first_frame(tmp_path):
    """A late start is no missing part, and frames before the start of an MP4 are not shown."""
    late = VideoOnDisk(encode(tmp_path / "late.mkv", GRAY, "libx264", {"g": "12"}, first=100))
    assert late.probe().times[:2].tolist() == [0.0, 0.1] and shown(late, [0, 49]) == [0, 49]
    early = encode(tmp_path / "early.mp4", GRAY, "libx264", {"g": "12"}, first=-7, avoid_negative_ts="disabled")
    assert len(VideoOnDisk(early).probe().times) == 43
    assert shown(VideoOnDisk(early), [0, 42]) == [7, 49]


@pytest.mark.parametrize("milliseconds, start, expected", [(2000, 0, range(20)), (1000, 25, range(25, 35))])
def test_trimmed_by_an_edit_list(tmp_path, milliseconds, start, expected):
    """Its samples are all in the file, but only some of them are shown."""
    file = encode(tmp_path / "clip.mp4", GRAY, "libx264", {"g": "12", "bf": "0"})
    data = bytearray(file.read_bytes())
    at = data.index(b"elst") + 12  # after its version and the number of entries
    units = int.from_bytes(data[data.index(b"mdhd") + 16 :][:4], "big")
    data[at : at + 8] = struct.pack(">Ii", milliseconds, start * units // RATE)
    video = VideoInMemory(bytes(data), "clip")
    assert shown(video, range(len(video.probe().times))) == list(expected)
    assert shown(video, [len(expected) - 1]) == [expected[-1]]


def test_frames_before_the_first_keyframe_are_left_out(tmp_path):
    source = encode(tmp_path / "clip.mkv", GRAY, "libx264", {"x264-params": "keyint=12:scenecut=0:bframes=2"})
    with av.open(str(source)) as whole, av.open(str(tmp_path / "cut.mkv"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in [packet for packet in whole.demux() if packet.size][5:]:
            packet.stream = stream
            cut.mux(packet)
    video = VideoOnDisk(tmp_path / "cut.mkv")
    assert shown(video, range(len(video.probe().times))) == list(range(12, 50))


def test_a_cover_is_not_the_video(tmp_path):
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        cover, stream = container.add_stream("mjpeg", 1), container.add_stream("libx264", RATE)
        cover.width, cover.height, cover.pix_fmt = 320, 200, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.mux(cover.encode(av.VideoFrame(320, 200, "yuvj420p")))
        container.mux(cover.encode())
        for number in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray(number), format="rgb24")))
        container.mux(stream.encode())
    video = VideoOnDisk(tmp_path / "clip.mkv")
    assert video.probe().size == (HEIGHT, WIDTH) and shown(video, [0, 4]) == [0, 4]


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_variable_rate(tmp_path, extension):
    times = [n * 4 if n < 20 else 80 + (n - 20) * 15 for n in range(40)]
    facts = VideoOnDisk(write(tmp_path / f"vfr.{extension}", 40, times)).probe()
    np.testing.assert_allclose(facts.times, np.array(times) / 100, atol=2e-3)
    video = VideoOnDisk(tmp_path / f"vfr.{extension}")
    assert shown(video, [0, 19, 20, 21, 39]) == [0, 19, 20, 21, 39]


def test_the_sources_of_bytes_agree(clips, tmp_path):
    file = clips / "clip.mp4"
    data = file.read_bytes()
    (tmp_path / "shard.bin").write_bytes(b"x" * 777 + data + b"y" * 99)
    frames = []
    for number in range(FRAMES):
        Image.fromarray(gray(number)).save(tmp_path / f"{number}.png")
        frames.append(ImageOnDisk(tmp_path / f"{number}.png"))
    sources = [
        VideoOnDisk(file),
        VideoInMemory(data, "clip"),
        VideoInFile(tmp_path / "shard.bin", 777, len(data), "clip"),
        FrameSequence(tuple(frames), RATE),
    ]
    for clip in ((None, None), (1.0, 2.05)):
        first = None
        for source in sources:
            video = type(source)(**{**vars(source), "start": clip[0], "end": clip[1]})
            facts = video.probe()
            found = (len(facts.times), facts.size, shown(video, [0, 2, 7]))
            first = first or found
            assert found == first, source
            np.testing.assert_allclose(facts.times, np.arange(len(facts.times)) / RATE, atol=1e-6)
        assert first[0] == (50 if clip[0] is None else 11)
        assert first[2] == ([0, 2, 7] if clip[0] is None else [10, 12, 17])


def test_a_member_of_a_tar_is_read_in_place(clips, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(clips / "clip.webm", "a.webm")
    with tarfile.open(tmp_path / "shard.tar") as tar:
        member = tar.getmember("a.webm")
    video = VideoInFile(tmp_path / "shard.tar", member.offset_data, member.size, "a.webm")
    assert shown(video, [5, 40]) == [5, 40]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation(tmp_path, rotation):
    video = VideoOnDisk(write(tmp_path / "turned.mp4", 5, rotation=rotation))
    turned = abs(rotation) == 90
    assert video.probe().size == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))
    (frame,) = video.frames([4])
    # the gray half is on the left; turned counterclockwise by 90 degrees, it is at the bottom
    upright = np.rot90(gray(4), rotation // 90)
    assert np.abs(np.asarray(frame).astype(int) - upright).mean() < 3


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


FAST = {"movflags": "faststart"}
DAMAGED = {
    "without its end": ("mp4", {}, lambda data: cut(data, 0.5), "cannot be decoded"),
    "an mp4 without its second half": (
        "mp4",
        {"movflags": "faststart"},
        lambda data: cut(data, 0.6),
        "cannot be decoded",
    ),
    "an mkv without its second half": ("mkv", {}, lambda data: cut(data, 0.5), "truncated|cannot be decoded"),
    "a fragmented mp4 without its end": (
        "mp4",
        {"movflags": "frag_keyframe+empty_moov"},
        lambda data: cut(data, 0.85),
        r"truncated: \d+ of \d+ frames",
    ),
    "empty": ("mp4", {}, lambda data: b"", "cannot be decoded"),
    "text": ("mp4", {}, lambda data: b"hello" * 100, "cannot be decoded"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file(tmp_path, name):
    extension, options, damage, message = DAMAGED[name]
    file = write(tmp_path / f"clip.{extension}", **options)
    data = damage(file.read_bytes())
    file.write_bytes(data)
    for video in (VideoOnDisk(file), VideoInMemory(data, "clip")):
        with pytest.raises(BadSample, match=message):
            video.probe()


@pytest.mark.parametrize("extension", ["ts", "mpg"])
def test_the_damaged_last_frame_of_a_file_without_a_header(tmp_path, extension):
    """The file does not say how long it was, but its last frame is incomplete."""
    texture = np.random.default_rng(0).integers(0, 256, (HEIGHT * 4, WIDTH * 4, 3), np.uint8)
    codec = "libx264" if extension == "ts" else "mpeg2video"
    file = encode(tmp_path / f"clip.{extension}", [texture] * 20, codec, {"g": "5", "b": "4M"}, rate=25)
    video = VideoInMemory(cut(file.read_bytes(), 0.6), "clip")
    with pytest.raises(BadSample, match=r"the frame at .* s is damaged"):
        list(video.frames(range(len(video.probe().times))))


@pytest.mark.parametrize(
    "limit, message",
    [("encoded.MAX_PIXELS", "it has 64x48 pixels: too many"), ("video.MAX_PACKETS", "more than 20 packets")],
)
def test_too_much(clips, monkeypatch, limit, message):
    monkeypatch.setattr(f"vlmtrain.data.{limit}", 20)
    with pytest.raises(BadSample, match=message):
        VideoOnDisk(clips / "clip.mkv").probe()


def test_without_pyav(clips, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadSample, match=r"clip\.mp4 needs PyAV: pip install 'vlmtrain\[video\]'"):
        VideoOnDisk(clips / "clip.mp4").probe()


def test_flipped_bytes(tmp_path):
    file = write(tmp_path / "clip.mp4", **FAST)
    data = bytearray(file.read_bytes())
    for at in range(len(data) // 2, len(data) - 200, 40):
        data[at] ^= 0x5A
    video = VideoInMemory(bytes(data), "clip")
    with pytest.raises(BadSample, match=r"damaged|cannot be decoded"):
        list(video.frames(range(len(video.probe().times))))


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5.0,\n{}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile '{}'\n",
    "mp4": "ffconcat version 1.0\nfile '{}'\n",
}


@pytest.mark.parametrize("extension", PLAYLISTS)
def test_playlists_are_refused(clips, tmp_path, extension):
    file = tmp_path / f"list.{extension}"
    file.write_text(PLAYLISTS[extension].format(clips / "clip.ts"))
    for video in (VideoOnDisk(file), VideoInMemory(file.read_bytes(), "list")):
        with pytest.raises(BadSample, match="cannot be decoded"):
            video.probe()


def test_clips_outside_the_video(clips):
    file = clips / "clip.mp4"
    with pytest.raises(BadSample, match=r"it starts at 7\.0 s, but the video has 5\.00 s"):
        VideoOnDisk(file, start=7.0).probe()
    with pytest.raises(BadSample, match=r"no frame from 4\.01 s to 4\.05 s"):
        VideoOnDisk(file, start=4.01, end=4.05).probe()
    with pytest.raises(BadSample, match="does not exist"):
        VideoOnDisk(file.with_name("none.mp4")).probe()
    assert len(VideoOnDisk(file, start=4.0, end=99.0).probe().times) == 10


def test_the_index_is_stored(clips, tmp_path, monkeypatch):
    file = tmp_path / "clip.mp4"
    file.write_bytes((clips / "clip.mp4").read_bytes())
    video = VideoOnDisk(file)
    facts = video.probe()
    with monkeypatch.context() as patched:
        patched.setattr(VideoOnDisk, "open", lambda self: pytest.fail("opened"))
        again = video.probe()
    assert (again.times == facts.times).all() and again[1:] == facts[1:]
    write(file, 20)
    assert len(video.probe().times) == 20


def test_bytes_in_memory_are_scanned_once(clips, monkeypatch):
    video, scans = VideoInMemory((clips / "clip.mkv").read_bytes(), "clip"), []
    scan = VideoInMemory._scan
    monkeypatch.setattr(VideoInMemory, "_scan", lambda self: scans.append(self) or scan(self))
    video.probe()
    assert shown(video, [3]) == [3] and len(video.probe().times) == FRAMES and len(scans) == 1


def test_nothing_stays_open(clips):
    def usage() -> tuple[int, int]:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(os.listdir("/proc/self/fd"))

    def use(times: int) -> None:
        for _ in range(times):
            next(iter(VideoOnDisk(clips / "clip.mkv").frames([20])))  # which leaves the iterator unfinished

    use(20)
    memory, files = usage()
    use(150)
    assert usage()[0] - memory < 30_000 and usage()[1] == files  # kB; containers left open take 70 MB


@pytest.fixture
def folder(tmp_path, clips) -> VideoFolder:
    home = tmp_path / "videos"
    (home / "frames").mkdir(parents=True)
    (home / "clip.mp4").write_bytes((clips / "clip.mp4").read_bytes())
    for number in (10, 9, 2):
        Image.fromarray(gray(number)).save(home / "frames" / f"{number}.png")
    (home / "frames" / "notes.txt").write_text("no frame")
    (home / "frames" / "._2.png").write_bytes(b"what macOS adds to archives")
    (home / "empty").mkdir()
    (tmp_path / "outside.mp4").write_bytes(b"")
    (home / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (home / "linked").mkdir()
    (home / "linked" / "0.png").symlink_to(tmp_path / "outside.png")
    return VideoFolder(home)


def test_records_name_videos(folder):
    assert shown(folder.read("clip.mp4", "0", "r", 1, 2), [0]) == [10]
    frames = folder.read("frames", "0", "r")
    assert shown(frames, [0, 1, 2]) == [2, 9, 10] and frames.probe().times.tolist() == [0.0, 0.5, 1.0]
    assert shown(folder.read(["frames/9.png", "frames/2.png"], "0", "r"), [0, 1]) == [9, 2]
    data = (Path(folder.folder) / "clip.mp4").read_bytes()
    assert shown(folder.read({"bytes": data, "path": "else.mp4"}, "0", "r"), [7]) == [7]
    assert shown(folder.read({"bytes": None, "path": "clip.mp4"}, "0", "r"), [7]) == [7]


@pytest.mark.parametrize(
    "value, times, message",
    [
        ("../outside.mp4", (), "leads out of data.videos"),
        ("link.mp4", (), "leads out of data.videos"),
        ("linked", (), "leads out of data.videos"),
        ("..", (), "leads out of data.videos"),
        ("frames/../..", (), "leads out of data.videos"),
        ("/etc/passwd", (), "leads out of data.videos"),
        ("http://x/y.mp4", (), "is a URL"),
        ("empty", (), "has no images"),
        (3, (), "must be a path"),
        ([], (), "must be a path"),
        ("clip.mp4", (2, 1), "must end after it starts"),
        ("clip.mp4", ("1", None), "'video_start' must be a number of seconds"),
        ("clip.mp4", (-1, None), "'video_start' must be a number of seconds"),
    ],
)
def test_bad_values(folder, value, times, message):
    with pytest.raises(BadSample, match=message):
        folder.read(value, "0", "r", *times)


def test_frames_of_unequal_sizes(folder):
    Image.new("RGB", (10, 10)).save(Path(folder.folder) / "frames" / "11.png")
    video = folder.read("frames", "0", "r")
    with pytest.raises(BadSample, match=r"11\.png is 10x10, but the first one is 48x64"):
        list(video.frames([3]))


def test_without_a_folder():
    with pytest.raises(BadSample, match=r"the record has a video, but data\.videos is not set"):
        VideoFolder().read("clip.mp4", "0", "r")
    with pytest.raises(ValueError, match=r"data\.videos=/none is not a folder"):
        VideoFolder("/none")
