"""Videos: found, indexed by their packets, and decoded frame by frame.

packets --probe--> times and size --plan--> frame numbers --frames--> RGB images, one at a time
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import first_line, is_finite_number, shown
from .encoded import MAX_PIXELS, BadSize, Encoded, InFile, InMemory, MediaFolder, OnDisk, check_size, in_natural_order
from .file_index import Index, cached_index
from .images import EncodedImage, ImageOnDisk, is_image_value
from .records import BadSample, VideoFacts, VideoSource

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,gif,flv,ogg,asf"
"""Containers that are read. Others, such as playlists, may name further files."""
EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov", "m4v", "mpg", "mpeg", "ts", "flv", "ogv", "wmv", "3gp", "gif")
MAX_PACKETS = 10_000_000
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers that know where their keyframes are. In others, seeking may miss, so they are decoded from the start."""
_MISSING = (0.5, 0.05)
"""Seconds, and part of the duration in the header, by which the packets of an intact video may end earlier."""


class _Packets(NamedTuple):
    """The index of a video: presentation times in `time_base`, those of keyframes, the end of the last frame.

    keys: the first one, and those that can be sought. size ``(H, W)``: of the upright frames. counted: whether frames
    are known by their order, because the container stores no presentation times.
    """

    pts: np.ndarray
    keys: np.ndarray
    end: int
    time_base: Fraction
    size: tuple[int, int]
    counted: bool

    @classmethod
    def of(cls, index: Index) -> _Packets:
        end, numerator, denominator, height, width, counted = index["facts"].tolist()
        base = Fraction(numerator, denominator)
        return cls(index["pts"], index["keys"], end, base, (height, width), bool(counted))

    @property
    def index(self) -> Index:
        facts = [self.end, self.time_base.numerator, self.time_base.denominator, *self.size, self.counted]
        return {"pts": self.pts, "keys": self.keys, "facts": np.array(facts, np.int64)}

    def clip(self, start: float | None, end: float | None) -> slice:
        """The frames from `start` to before `end`, in seconds. Raises ValueError if there are none."""
        times = self.seconds(self.pts)
        length = self.seconds(self.end)
        if start is not None and start >= length:
            raise ValueError(f"it starts at {start} s, but the video has {length:.2f} s")
        first = 0 if start is None else int(np.searchsorted(times, start - 1e-6))
        last = len(times) if end is None else int(np.searchsorted(times, end - 1e-6))
        if first >= last:
            raise ValueError(f"it has no frame from {start or 0} s to {end} s")
        return slice(first, last)

    def seconds(self, pts: np.ndarray | int, first: int = 0) -> np.ndarray | float:
        """Presentation times in seconds from the frame with number `first`."""
        return (pts - self.pts[first]) * self.time_base.numerator / self.time_base.denominator


class EncodedVideo(Encoded):
    """An encoded video, or a clip of it; a subclass provides its bytes.

    start, end: of the clip in seconds; None for those of the video. The times of a clip start at 0.
    """

    noun = "video"
    start: float | None
    end: float | None

    def probe(self) -> VideoFacts:
        """Times of the frames, from the packets, and their size, for which the first one is decoded. Raises BadSample.

        Of a video in a file, they are stored on disk, so that it is opened once.
        """
        packets = self._packets()
        part = self._clip(packets)
        end = packets.pts[part.stop] if part.stop < len(packets.pts) else packets.end
        times, duration = (packets.seconds(pts, part.start) for pts in (packets.pts[part], end))
        return VideoFacts(times, float(duration), packets.size)

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Decode the frames with these numbers, which are ascending, one after another, upright, as RGB.

        Raises BadSample for a frame that is missing or damaged.
        """
        packets = self._packets()
        first = self._clip(packets).start
        wanted = [int(packets.pts[first + number]) for number in numbers]
        with self._decoding() as (container, stream):
            decoded, at = container.decode(stream), packets.pts[0] - 1
            in_order = iter(packets.pts)
            for pts in wanted:
                key = packets.keys[bisect_right(packets.keys, pts) - 1]
                if key > max(at, packets.pts[0]):
                    decoded = _decoded_from((key, packets.keys[0]), pts, container, stream)
                while at < pts and (frame := next(decoded, None)) is not None:
                    at = next(in_order, packets.end) if packets.counted else _time_of(frame)
                    if frame.is_corrupt:
                        raise ValueError(f"the frame at {packets.seconds(at):.2f} s is damaged")
                if at != pts:
                    raise ValueError(f"the frame at {packets.seconds(pts):.2f} s is missing")
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
        """The index of the packets: scanned once, and stored on disk if the video is in a file."""
        raise NotImplementedError

    def _scan(self) -> Index:
        with self._decoding() as (container, stream):
            check_size((stream.width, stream.height))
            times, keys, ends, durations, packets = [], [], [], [], 0
            for packet in container.demux():
                packets += packet.stream_index == stream.index and packet.size > 0
                time = _time_of(packet)
                if time is None or not packet.size:
                    continue
                if packet.stream_index == stream.index and packet.is_keyframe:
                    keys.append(time)
                if packet.is_discard:
                    continue
                ends.append((time + (packet.duration or 0)) * packet.time_base)
                if packet.stream_index == stream.index:
                    times.append(time)
                    durations.append(packet.duration or 0)
                if len(ends) > MAX_PACKETS:
                    raise ValueError(f"it has more than {MAX_PACKETS:,} packets")
            if not times:
                raise ValueError("it has no frames")
            # the header also counts the frames that an edit list leaves out, which have no entry
            expected = len(stream.index_entries) if container.format.name == _INDEXED[0] else stream.frames
            if packets < expected:
                raise ValueError(f"it is truncated: {packets} of {expected} frames")
            keys = np.unique(np.array(keys or [min(times)], np.int64))
            pts = np.unique(np.array(times, np.int64))
            pts = pts[pts >= keys[0]]  # those before the first keyframe cannot be decoded
            gap = round(np.median(np.diff(pts))) if len(pts) > 1 else 0
            _check_complete(container, max(ends), gap * stream.time_base)
            last = durations[int(np.argmax(times))] or gap or round(1 / stream.time_base)
            container.seek(int(keys[0]), stream=stream, backward=True)
            frame = next(container.decode(stream), None)  # only a decoded frame knows its rotation
            if frame is None:
                raise ValueError("none of its frames can be decoded")
            image = _upright(frame)
            check_size(image.size)
            return _Packets(
                pts,
                keys if container.format.name in _INDEXED else keys[:1],
                int(pts[-1]) + last,
                stream.time_base,
                image.size[::-1],
                container.format.name == "avi",
            ).index

    @contextmanager
    def _decoding(self) -> Iterator[tuple]:
        """The open container and its video stream. Errors become BadSample."""
        try:
            import av
        except ImportError:
            raise BadSample(f"video {self.label} needs PyAV: pip install 'vlmtrain[video]'") from None
        with self.naming_failures():
            file = self.open()
        with file:
            try:
                with av.open(file, options={"format_whitelist": DEMUXERS}) as container:
                    stream = container.streams.best("video")  # not the cover image
                    if stream is None:
                        raise ValueError("it has no video stream")
                    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
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
        return cached_index(self.path, "packets", self._scan, least=0)


@dataclass(frozen=True)
class VideoInMemory(InMemory, EncodedVideo):
    """The encoded bytes of a video."""

    start: float | None = None
    end: float | None = None

    @cached_property
    def _index(self) -> Index:
        return self._scan()

    def _indexed(self) -> Index:
        return self._index


@dataclass(frozen=True)
class VideoInFile(InFile, EncodedVideo):
    """A video within a larger file: `length` bytes from `offset`."""

    start: float | None = None
    end: float | None = None

    def _indexed(self) -> Index:
        return cached_index(self.file, f"packets at {self.offset} to {self.length}", self._scan, least=0)


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
        images = self._clip()
        return VideoFacts(np.arange(len(images)) / self.fps, len(images) / self.fps, images[0].size())

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Decode the frames with these numbers. Raises BadSample for one of another size."""
        images = self._clip()
        size = images[0].size()
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
        if isinstance(value, EncodedVideo):
            return replace(value, start=start, end=end)
        if isinstance(value, dict):
            given = [value[key] for key in ("bytes", "path") if value.get(key) is not None]
            value = given[0] if given else value
        if isinstance(value, bytes):
            return VideoInMemory(value, label, start, end)
        if isinstance(value, list) and value and all(isinstance(path, str) for path in value):
            return FrameSequence(self._frames(value, name), self.fps, start, end)
        if not isinstance(value, str) or not value:
            expected = "a path, a list of paths of frames or bytes"
            raise BadSample(f"{name}: video {label} must be {expected}, got {shown(value)}")
        whole = self.whole(value, name)
        if whole.is_dir():
            return FrameSequence(self._frames(self._listed(value, whole, name), name), self.fps, start, end)
        return VideoOnDisk(whole, value.removeprefix("file://"), start, end)

    def _frames(self, paths: Sequence[str], name: str) -> tuple[ImageOnDisk, ...]:
        return tuple(ImageOnDisk(self.whole(path, name), path.removeprefix("file://")) for path in paths)

    @staticmethod
    def _listed(path: str, folder: Path, name: str) -> list[str]:
        """The paths of the frames in a folder in natural order: ``2.jpg`` before ``10.jpg``."""
        names = [file for file in os.listdir(folder) if is_image_value(file) and not file.startswith(".")]
        files = sorted(names, key=in_natural_order)
        if not files:
            raise BadSample(f"{name}: the folder of frames {shown(path)} has no images")
        return [os.path.join(path, file) for file in files]


def _time_of(packet) -> int | None:
    """Presentation time of a packet or a frame; old containers have only that of decoding."""
    return packet.dts if packet.pts is None else packet.pts


def _decoded_from(keys: Sequence[int], pts: int, container, stream) -> Iterator:
    """The frames from the first of `keys` that the frame at `pts` can be decoded from.

    Packets that start to refresh a frame in parts are called keyframes too.
    """
    for key in keys:
        container.seek(int(key), stream=stream, backward=True)
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


def _check_complete(container, end: Fraction, gap: Fraction) -> None:
    """Raise ValueError if the packets end clearly before the duration in the header, which a truncated file keeps."""
    stated = (container.duration or 0) / 1_000_000
    begin = (container.start_time or 0) / 1_000_000
    found = max(float(end), float(end) - begin)  # the duration counts from 0 in Matroska, else from the first packet
    if stated - found > max(_MISSING[0], _MISSING[1] * stated, 2.5 * float(gap)):
        raise ValueError(f"it is truncated: it ends after {found:.2f} s of {stated:.2f} s")
