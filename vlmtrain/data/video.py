"""Videos: found, indexed without decoding, and decoded frame by frame.

packets --probe--> times and size --plan--> frame numbers --frames--> RGB images, one at a time
"""

from __future__ import annotations

import io
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ..errors import first_line, is_finite_number, shown
from .encoded import BadSize, Encoded, InFile, InMemory, MediaFolder, OnDisk, check_size
from .file_index import Index, cached_index
from .images import EncodedImage, ImageOnDisk, is_image_value
from .records import BadSample, VideoFacts, VideoSource

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,gif,flv,ogg,asf"
"""Containers that are read. Others, such as playlists, may name further files."""
EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov", "m4v", "mpg", "mpeg", "ts", "flv", "ogv", "wmv", "3gp", "gif")
MAX_PACKETS = 10_000_000
SLACK = 10
"""Seconds before the first frame from which a container is read if it cannot be read from a later place."""
_COMPLETE = 0.9
"""Smallest part of its stated duration that an intact video has."""


class _Packets(NamedTuple):
    """The index of a video: presentation times in `time_base`, those of keyframes, the end of the last frame.

    size ``(H, W)``: of the upright frames.
    """

    pts: np.ndarray
    keys: np.ndarray
    end: int
    time_base: Fraction
    size: tuple[int, int]

    @classmethod
    def of(cls, index: Index) -> _Packets:
        end, numerator, denominator, height, width = index["facts"].tolist()
        return cls(index["pts"], index["keys"], end, Fraction(numerator, denominator), (height, width))

    @property
    def index(self) -> Index:
        facts = np.array([self.end, self.time_base.numerator, self.time_base.denominator, *self.size], np.int64)
        return {"pts": self.pts, "keys": self.keys, "facts": facts}

    def clip(self, start: float | None, end: float | None) -> slice:
        """The frames from `start` to before `end`, in seconds. Raises ValueError if there are none."""
        times = self.seconds(self.pts)
        length = float(self.seconds(np.array([self.end]))[0])
        if start is not None and start >= length:
            raise ValueError(f"it starts at {start} s, but the video has {length:.2f} s")
        first = 0 if start is None else int(np.searchsorted(times, start - 1e-6))
        last = len(times) if end is None else int(np.searchsorted(times, end - 1e-6))
        if first >= last:
            raise ValueError(f"there is no frame from {start or 0} s to {end} s")
        return slice(first, last)

    def seconds(self, pts: np.ndarray) -> np.ndarray:
        """Presentation times in seconds from the first frame."""
        return (pts - self.pts[0]) * self.time_base.numerator / self.time_base.denominator


class EncodedVideo(Encoded):
    """An encoded video, or a clip of it; a subclass provides its bytes.

    start, end: of the clip in seconds; None for those of the video. The times of a clip start at 0.
    """

    noun = "video"
    start: float | None
    end: float | None

    def probe(self) -> VideoFacts:
        """Times and size of the frames, from the packets. Raises BadSample."""
        packets = self._packets()
        part = self._clip(packets)
        times = packets.seconds(packets.pts)
        end = times[part.stop] if part.stop < len(times) else packets.seconds(np.array([packets.end]))[0]
        return VideoFacts(times[part] - times[part.start], float(end - times[part.start]), packets.size)

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Decode the frames with these numbers, which are ascending, one after another, upright, as RGB.

        Raises BadSample for a frame that is missing or damaged.
        """
        packets = self._packets()
        first = self._clip(packets).start
        wanted = [int(packets.pts[first + number]) for number in numbers]
        with self._decoding() as (container, stream):
            decoded, at = iter(()), None
            for pts in wanted:
                keys = packets.keys[: max(1, bisect_right(packets.keys, pts))]
                if at is None or keys[-1] > at:
                    decoded, at = _from_before(pts, keys, container, stream), None
                while at is None or at < pts:
                    frame = next(decoded, None)
                    if frame is None:
                        break
                    if frame.is_corrupt:
                        raise ValueError(f"the frame at {frame.time or 0:.2f} s is damaged")
                    at = _time_of(frame)
                if at != pts:
                    time = float((pts - packets.pts[first]) * packets.time_base)
                    raise ValueError(f"the frame at {time:.2f} s is missing")
                yield _upright(frame)

    def check(self) -> None:
        """Check the packets. Raises BadSample."""
        self.probe()

    def _clip(self, packets: _Packets) -> slice:
        try:
            return packets.clip(self.start, self.end)
        except ValueError as error:
            raise BadSample(f"{self.noun} {self.label} has no such clip: {error}") from None

    def _packets(self) -> _Packets:
        with self.naming_failures():
            return _Packets.of(self._indexed())

    def _indexed(self) -> Index:
        """The index of the packets, stored on disk if the video is in a file."""
        return self._scan()

    def _scan(self) -> Index:
        with self._decoding() as (container, stream):
            times, keys, ends, durations, packets = [], [], [], [], 0
            for packet in container.demux():
                time = _time_of(packet)
                packets += packet.stream_index == stream.index and packet.size > 0
                if time is None or packet.is_discard or not packet.size:
                    continue
                ends.append((time + (packet.duration or 0)) * packet.time_base)
                if packet.stream_index == stream.index:
                    times.append(time)
                    durations.append(packet.duration or 0)
                    keys += [time] if packet.is_keyframe else []
                if len(times) > MAX_PACKETS:
                    raise ValueError(f"it has more than {MAX_PACKETS:,} frames")
            if not times:
                raise ValueError("it has no frames")
            pts = np.unique(np.array(times, np.int64))
            if packets < stream.frames:
                raise ValueError(f"it is truncated: {packets} of {stream.frames} frames")
            gap = float(np.median(np.diff(pts))) if len(pts) > 1 else 0.0
            _check_complete(container, stream, max(ends), gap * stream.time_base)
            last = durations[int(np.argmax(times))] or round(gap) or round(1 / stream.time_base)
            keys = np.unique(np.array(keys or times[:1], np.int64))
            container.seek(int(keys[0]), stream=stream, backward=True)
            image = _upright(next(container.decode(stream)))  # only a decoded frame knows its rotation
            check_size(image.size)
            return _Packets(pts, keys, int(pts[-1]) + last, stream.time_base, image.size[::-1]).index

    @contextmanager
    def _decoding(self) -> Iterator[tuple]:
        """The open container and its video stream. Errors become BadSample."""
        av = _library(self.noun, self.label)
        with self.naming_failures():
            file = self.open()
        with file:
            try:
                with av.open(file, options={"format_whitelist": DEMUXERS}) as container:
                    if not container.streams.video:
                        raise ValueError("it has no video stream")
                    stream = container.streams.video[0]
                    stream.thread_type = "NONE"  # the data workers use all cores
                    yield container, stream
            except (BadSample, GeneratorExit):
                raise
            except BadSize as error:
                raise BadSample(f"video {self.label} cannot be used: {error}") from None
            except Exception as error:  # decoders can raise any exception for malformed bytes
                raise BadSample(f"video {self.label} cannot be decoded: {first_line(error)}") from None


@dataclass(frozen=True)
class VideoOnDisk(OnDisk, EncodedVideo):
    """A video file. relative: its path within the folder of videos, if it has one."""

    start: float | None = None
    end: float | None = None

    def _indexed(self) -> Index:
        return cached_index(self.path, "video", self._scan, least=0)


@dataclass(frozen=True)
class VideoInMemory(InMemory, EncodedVideo):
    """The encoded bytes of a video."""

    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class VideoInFile(InFile, EncodedVideo):
    """A video within a larger file: `length` bytes from `offset`."""

    start: float | None = None
    end: float | None = None

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Span(self.file, self.offset, self.length))

    def _indexed(self) -> Index:
        return cached_index(self.file, f"video at {self.offset} to {self.length}", self._scan, least=0)


@dataclass(frozen=True)
class FrameSequence:
    """A video whose frames are images, `fps` per second. start, end: see `EncodedVideo`."""

    images: tuple[EncodedImage, ...]
    fps: float
    start: float | None = None
    end: float | None = None

    @property
    def label(self) -> str:
        return f"of {len(self.images)} frames from {self.images[0].label}"

    def probe(self) -> VideoFacts:
        """Times of the frames, and the size of the first one. Raises BadSample."""
        count = len(self._clip())
        return VideoFacts(np.arange(count) / self.fps, count / self.fps, self.images[0].size())

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Decode the frames with these numbers. Raises BadSample for one of another size."""
        images, size = self._clip(), self.images[0].size()
        for number in numbers:
            image = images[number].load()
            if image.size[::-1] != size:
                found = f"{image.size[1]}x{image.size[0]}"
                raise BadSample(f"frame {images[number].label} is {found}, but the first one is {size[0]}x{size[1]}")
            yield image

    def check(self) -> None:
        """Check the first and last bytes of the frames. Raises BadSample."""
        for image in self._clip():
            image.check()

    def _clip(self) -> tuple[EncodedImage, ...]:
        first = 0 if self.start is None else math.ceil(self.start * self.fps - 1e-6)
        last = len(self.images) if self.end is None else math.ceil(self.end * self.fps - 1e-6)
        if not self.images[first:last]:
            length = len(self.images) / self.fps
            raise BadSample(
                f"video {self.label} has no frame from {self.start or 0} s to {self.end or length} s: it has {length} s"
            )
        return self.images[first:last]


class VideoFolder(MediaFolder):
    """Videos as records name them: encoded, or by path relative to a folder.

    fps: frames per second of videos that are folders or lists of frames.
    """

    noun, key = "video", "data.videos"

    def __init__(self, folder: str | Path | None = None, fps: float = 2.0, outside: bool = False):
        super().__init__(folder, outside)
        self.fps = fps

    def read(self, value: object, label: str, name: str, start: object = None, end: object = None) -> VideoSource:
        """The video of record `name`: the path of a file or of a folder of frames, a list of paths of frames, or bytes.

        label: of encoded bytes. start, end: of the clip to show, in seconds. Raises BadSample if `value` or the times
        are none of these, or if a path is not allowed.
        """
        for key, time in (("video_start", start), ("video_end", end)):
            if time is not None and not (is_finite_number(time) and time >= 0):
                raise BadSample(f"{name}: '{key}' must be a number of seconds, got {shown(time)}")
        if start is not None and end is not None and end <= start:
            raise BadSample(f"{name}: the video must end after it starts, got {start} s to {end} s")
        if isinstance(value, dict):
            given = [value[key] for key in ("bytes", "path") if value.get(key) is not None]
            value = given[0] if given else value
        if isinstance(value, bytes):
            return VideoInMemory(value, label, start, end)
        if isinstance(value, list) and value and all(isinstance(path, str) for path in value):
            frames = tuple(ImageOnDisk(self.whole(path, name)) for path in value)
            return FrameSequence(frames, self.fps, start, end)
        if not isinstance(value, str) or not value:
            expected = "a path, a list of paths of frames or bytes"
            raise BadSample(f"{name}: video {label} must be {expected}, got {shown(value)}")
        whole = self.whole(value, name)
        if whole.is_dir():
            return FrameSequence(self._frames(value, whole, name), self.fps, start, end)
        return VideoOnDisk(whole, value.removeprefix("file://"), start, end)

    def _frames(self, path: str, folder: Path, name: str) -> tuple[ImageOnDisk, ...]:
        """The frames of a folder in natural order: ``2.jpg`` before ``10.jpg``."""
        files = sorted(filter(is_image_value, os.listdir(folder)), key=_natural)
        if not files:
            raise BadSample(f"{name}: the folder of frames {shown(path)} has no images")
        return tuple(ImageOnDisk(self.whole(os.path.join(path, file), name)) for file in files)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _library(noun: str, label: str):
    """PyAV. Raises BadSample if it is not installed."""
    try:
        import av
    except ImportError:
        raise BadSample(f"{noun} {label} needs PyAV: pip install 'vlmtrain[video]'") from None
    av.logging.set_level(None)  # damaged files are reported as bad samples
    return av


def _time_of(packet) -> int | None:
    """Presentation time of a packet or a frame; old containers have only that of decoding."""
    return packet.dts if packet.pts is None else packet.pts


def _from_before(pts: int, keys: np.ndarray, container, stream) -> Iterator:
    """The frames from one that is not after `pts`. Some containers are read from later than the given keyframe."""
    before = int(keys[0] - SLACK / stream.time_base)
    for key in (*reversed(keys.tolist()), before):
        container.seek(key, stream=stream, backward=True)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and _time_of(first) <= pts:
            yield first
            yield from frames
            return


def _upright(frame) -> Image.Image:
    """A frame as RGB, rotated as its container says."""
    image = frame.to_image()
    turned = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    how = turned.get(round(frame.rotation / 90) * 90 % 360)
    return image if how is None else image.transpose(how)


def _check_complete(container, stream, end: Fraction, gap: Fraction) -> None:
    """Raise ValueError if the packets end clearly before the duration in the header, which a truncated file keeps."""
    begin = (container.start_time or 0) / 1_000_000
    stated = (container.duration or 0) / 1_000_000
    found = float(end) - begin
    if stated and found < _COMPLETE * stated and stated - found > 2.5 * float(gap):
        raise ValueError(f"it is truncated: it ends after {found:.2f} s of {stated:.2f} s")


class _Span(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, path: Path, offset: int, length: int):
        super().__init__()
        self._offset, self._length, self._at = offset, length, 0
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("a position before the start")
        self._at = start + offset
        return self._at

    def readinto(self, buffer) -> int:
        size = max(0, min(len(buffer), self._length - self._at))
        data = os.pread(self._file.fileno(), size, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
