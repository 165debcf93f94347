"""The media of a record: its images and videos, and the marks in its turns that stand for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import shown
from .actions import Action
from .images import ImageFolder, is_image_value
from .records import IMAGE_MARK, VIDEO_MARK, BadSample, ImageSource, Turn, VideoSource, is_video
from .regions import Region
from .video import VideoFolder

MEDIA = ("image", "video", "video_start", "video_end")
"""Roles of a record's media."""
ITEM_IMAGES = ("image", "image_url", "url", "path", "base64", "data")
"""Keys of the image of a typed item."""

_AT_ENDS = re.compile(rf"^\s*{VIDEO_MARK}|{VIDEO_MARK}\s*$")

Medium = ImageSource | VideoSource
Mark = Medium | int | str
"""A medium, the position of an image among the record's images, or the mark itself for the next medium."""


class Said(NamedTuple):
    """A turn, the media of its marks, its regions and its actions.

    The images of regions are positions among the record's images.
    """

    turn: Turn
    marks: tuple[Mark, ...] = ()
    regions: tuple[Region, ...] = ()
    actions: tuple[Action, ...] = ()


def user_said(text: str) -> Said:
    return Said(Turn("user", text), marks_of(text))


def marks_of(text: str) -> tuple[str, ...]:
    return tuple(re.findall(f"{IMAGE_MARK}|{VIDEO_MARK}", text))


def read_images(folder: ImageFolder, value: object, key: str | None, name: str) -> tuple[ImageSource, ...]:
    """The images of a record."""
    if value is None or value == "":
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(folder.read(one, f"{i} of '{key}'", name) for i, one in enumerate(values))


def read_videos(folder: VideoFolder, values: Mapping, key: str | None, name: str) -> tuple[VideoSource, ...]:
    """The videos of a record, each with its start and end in seconds."""
    value, starts, ends = (values.get(role) for role in MEDIA[1:])
    if value is None or value == "" or value == []:
        if starts is not None or ends is not None:
            raise BadSample(f"{name}: the record has the start or end of a video, but no video")
        return ()
    is_frames = isinstance(value, list) and all(isinstance(one, str) and is_image_value(one) for one in value)
    values = value if isinstance(value, list) and not is_frames else [value]
    columns = []
    for role, times in (("video_start", starts), ("video_end", ends)):
        times = times if isinstance(times, list) else [times] * len(values)
        if len(times) != len(values):
            raise BadSample(f"{name}: '{role}' has {len(times)} times for {len(values)} videos")
        columns.append(times)
    each = enumerate(zip(values, *columns))
    return tuple(folder.read(one, f"{i} of '{key}'", name, start, end) for i, (one, start, end) in each)


def item_image(folder: ImageFolder, item: Mapping, name: str) -> ImageSource | int | str:
    """The image of a typed item, as a mark."""
    named = [key for key in ITEM_IMAGES if key in item]
    if "index" in item:
        if named or not isinstance(item["index"], int) or isinstance(item["index"], bool):
            raise BadSample(f"{name}: an image item must have an 'index' or an image, got {shown(item)}")
        return item["index"]
    if len(named) > 1:
        raise BadSample(f"{name}: an image item must have one image, got {' and '.join(named)}")
    return folder.read(item[named[0]], "of 'content'", name) if named else IMAGE_MARK


def item_video(folder: VideoFolder, item: Mapping, name: str) -> VideoSource | str:
    """The video of a typed item, as a mark."""
    if "video" not in item:
        return VIDEO_MARK
    return folder.read(item["video"], "of 'content'", name, item.get("video_start"), item.get("video_end"))


def media_first(said: Sequence[Said], media: str) -> list[Said]:
    """Turns with the marks of all `media` before the user's first text, unless there are marks."""
    first = next((i for i, each in enumerate(said) if each.turn.role == "user"), None)
    has_videos = VIDEO_MARK in media
    if first is None or any(mark != VIDEO_MARK or has_videos for each in said for mark in each.marks):
        return list(said)
    marked = user_said("\n".join(filter(None, [media, said[first].turn.text])))
    return [*said[:first], marked, *said[first + 1 :]]


def with_media(
    said: Sequence[Said], images: Sequence[ImageSource], videos: Sequence[VideoSource], name: str
) -> tuple[list[Said], tuple[Medium, ...]]:
    """Turns with the media of their marks, and the media without a mark. Raises BadSample for a wrong index.

    Without images, the marks of images are those of videos, as in LLaVA-Video-178K. Without videos, the marks of videos
    are ordinary text (HTML), except at the start or the end of a turn.
    """
    flat = [mark for each in said for mark in each.marks]
    indices = [mark for mark in flat if isinstance(mark, int)]
    if indices and IMAGE_MARK in flat:
        raise BadSample(f"{name}: some image items have an 'index' and others have none")
    if not all(0 <= index < len(images) for index in indices):
        raise BadSample(f"{name}: the image items have the indices {indices}, but there are {len(images)} images")
    rest = {IMAGE_MARK: list(images), VIDEO_MARK: list(videos)}
    if not images:
        rest[IMAGE_MARK] = rest[VIDEO_MARK]

    def medium_of(mark: Mark) -> Medium | None:
        if isinstance(mark, int):
            return images[mark]
        if not isinstance(mark, str):
            return mark
        return rest[mark].pop(0) if rest[mark] else None

    asked = (each.turn.text for each in said if each.turn.role == "user")
    unmet = next((text for text in asked if _AT_ENDS.search(text)), None)
    if unmet is not None and not videos and not any(map(is_video, flat)):
        raise BadSample(f"{name}: {shown(unmet)} has the mark {VIDEO_MARK}, but the record has no video")
    found = [each._replace(marks=tuple(filter(None, map(medium_of, each.marks)))) for each in said]
    unmarked = [] if indices else [*rest[IMAGE_MARK]] if images else []
    return found, (*unmarked, *rest[VIDEO_MARK])
