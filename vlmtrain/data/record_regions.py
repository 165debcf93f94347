"""The regions of a record: its boxes and points, and the marks in its turns that stand for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import is_finite_number, shown
from .record_media import Medium, Said
from .records import BadSample, region_marks
from .regions import BOX_MARK, POINT_MARK, Region

REGIONS = {BOX_MARK: ("boxes", "box_images", 4), POINT_MARK: ("points", "point_images", 2)}
"""For each mark of regions: the keys of their coordinates and of their images, and the number of coordinates."""


def region_keys(record: Mapping) -> list[str]:
    """The keys of regions that a record has."""
    return [key for *keys, _ in REGIONS.values() for key in keys if key in record]


def with_regions(said: Sequence[Said], record: Mapping, name: str) -> list[Said]:
    """Turns with the regions of their marks. Raises BadSample unless the record has one for each mark.

    In a record without regions, marks are ordinary text.
    """
    if not region_keys(record):
        return list(said)
    waiting = {mark: iter(_regions(record, mark, said, name)) for mark in REGIONS}
    return [each._replace(regions=tuple(next(waiting[mark]) for mark in region_marks(each.turn))) for each in said]


def _regions(record: Mapping, mark: str, said: Sequence[Said], name: str) -> list[Region]:
    """The regions of a record that have one kind of mark. Raises BadSample."""
    key, of_images, count = REGIONS[mark]
    given = record.get(key, [])
    media = record.get(of_images, [0] * len(given) if isinstance(given, list) else [])
    if not isinstance(given, list) or not all(
        isinstance(at, list) and len(at) == count and all(map(is_finite_number, at)) for at in given
    ):
        raise BadSample(f"{name}: '{key}' must be a list of lists of {count} numbers, got {shown(given)}")
    if not isinstance(media, list) or len(media) != len(given) or not all(type(medium) is int for medium in media):
        raise BadSample(f"{name}: '{of_images}' must be a list of the image of each of '{key}', got {shown(media)}")
    marks = sum(region_marks(each.turn).count(mark) for each in said)
    if marks != len(given):
        ignored = ",".join(region_keys(record))
        raise BadSample(
            f"{name}: {marks} {mark} marks in the text, but {len(given)} {key}; data.ignore=[{ignored}] trains on the "
            "text as it is"
        )
    return [Region(tuple(map(float, at)), medium) for at, medium in zip(given, media)]


def located(
    regions: Iterable[Region], images: Sequence[Medium], media: Sequence[Medium], name: str
) -> tuple[Region, ...]:
    """Regions of `images`, with the indices of their images among `media`. Raises BadSample for a wrong number."""
    found = []
    for region in regions:
        image = images[region.medium] if 0 <= region.medium < len(images) else None
        number = next((i for i, medium in enumerate(media) if medium is image), None)
        if number is None:
            raise BadSample(f"{name}: a {region.mark} is in image {region.medium}, but there are {len(images)} images")
        found.append(region._replace(medium=number))
    return tuple(found)
