"""The settings of the `data` group: the sources of each split, and the options of each format.

A split is one source or several named sources, each with the keys that differ from those of the group:

    data.instruct: chats.json
    data.instruct: {chats: chats.json, captions: {format: webdataset, path: captions/, samples: 100000}}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import ClassVar

from ..data import motion, reach
from ..data.hf_dataset import COLUMNS
from ..data.interleaved import Rules
from ..data.probes import CATEGORIES, LEVELS
from ..data.rendered import LOSS_PER
from ..data.shapes import SPLITS
from ..errors import nearest
from .fields import MAPPING, NAMES, POSITIVE, SWITCH, TEXT, Kind, key, list_of, number, one_of, optional, read, whole

PURPOSES = ("caption", "text", "align", "instruct", "knowledge", "multitask", "validation")
"""Splits that the `data` group may contain, whether or not a recipe uses them."""
_COUNT = whole(1, 10**10)
_SOME = list_of(one_of(*CATEGORIES), f"a non-empty list of some of {', '.join(CATEGORIES)}", sizes=range(1, 10**6))
_SIDE = whole(16, 4096)
_SIDES = Kind(
    "null, or [LEAST, MOST] of the height and the width in pixels, each from 16 to 4,096",
    lambda value: value is None or (list_of(_SIDE, "", sizes=(2,)).fits(value) and value[0] <= value[1]),
    lambda value, key: value and tuple(value),
)


def _columns(value: Mapping, key: str) -> Mapping[str, str | None]:
    for role in value:
        if role not in COLUMNS:
            raise ValueError(f"unknown key '{key}.{role}'.{nearest(role, COLUMNS)} The roles are {', '.join(COLUMNS)}")
    return MappingProxyType({role: optional(TEXT)(column, f"{key}.{role}") for role, column in value.items()})


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """The keys that sources of every format have."""

    format: str = key(TEXT)
    weight: float | None = key(optional(POSITIVE), None)  # share of the samples of an epoch
    samples: int | None = key(optional(_COUNT), None)  # samples per epoch; null: each record once
    loss_weight: float | None = key(optional(POSITIVE), None)  # weight of the source's mean loss
    loss_per: str | None = key(optional(one_of(*LOSS_PER)), None)  # as loss_per of the stage; null: the stage's
    token_weight: float = key(POSITIVE, 1.0)  # factor of the loss weights of the source's targets
    streaming: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class RecordSource(DataSource):
    """The keys of all formats that read records."""

    path: str = key(TEXT)
    ignore: tuple[str, ...] = key(NAMES, ())  # keys of records that are not read even if they would change training
    prepend_missing_marks: bool = key(SWITCH, False)  # put an image without a mark before the first question
    repair: bool = key(SWITCH, False)  # repair the order of turns


@dataclass(frozen=True, kw_only=True)
class LlavaJSONSource(RecordSource):
    """A file in LLaVA's format, or a list of such files."""

    images: str | None = key(optional(TEXT), None)  # folder that image paths are relative to
    videos: str | None = key(optional(TEXT), None)  # folder that video paths are relative to
    frames_fps: float = key(POSITIVE, 2)  # frames per second of videos that are folders or lists of frames
    outside_images: bool = key(SWITCH, False)  # whether paths of images and videos may leave their folder


@dataclass(frozen=True, kw_only=True)
class HFSource(LlavaJSONSource):
    """A Hugging Face dataset."""

    columns: Mapping[str, str | None] | None = key(optional(Kind("{role: column}", MAPPING.fits, _columns)), None)
    split: str = key(TEXT, "train")  # split of the dataset
    name: str | None = key(optional(TEXT), None)  # configuration of the dataset
    streaming: bool = key(SWITCH, False)  # read the files in order, as they are needed
    shuffle_buffer: int | None = key(optional(whole(1, 10**7)), None)  # records that a stream shuffles; null: 1000


@dataclass(frozen=True, kw_only=True)
class DocumentSource(DataSource):
    """Documents in which images stand between texts, and the rules by which they are sampled."""

    path: str = key(TEXT)
    images: str | None = key(optional(TEXT), None)  # folder of the images that are not in the records
    outside_images: bool = key(SWITCH, False)  # whether paths of images may leave their folder
    max_images: int | None = key(optional(whole(1, 10**4)), None)  # the first images of a document that are kept
    min_image_bytes: int = key(whole(0, 10**9), 0)  # smaller image files are left out
    one_image_share: float = key(number(0, 1), 1.0)  # share of the documents with a single image that are kept
    train_first_text: bool = key(SWITCH, True)  # whether the text before the first image is trained on
    next_image: float = key(number(0, 1), 0.0)  # share of the documents whose texts belong to the image after them
    random_window: bool = key(SWITCH, False)  # start documents longer than max_length at a random place


@dataclass(frozen=True, kw_only=True)
class MMC4Source(DocumentSource):
    """MMC4, sampled by OpenFlamingo's rules."""

    max_images: int | None = key(optional(whole(1, 10**4)), 6)
    min_image_bytes: int = key(whole(0, 10**9), 11_000)
    one_image_share: float = key(number(0, 1), 0.5)
    train_first_text: bool = key(SWITCH, False)
    min_similarity: float = key(number(-1, 1), 0.24)  # least similarity of an image and its sentence


@dataclass(frozen=True, kw_only=True)
class ObelicsSource(DocumentSource):
    """OBELICS."""


@dataclass(frozen=True, kw_only=True)
class CommSource(DocumentSource):
    """CoMM, converted to JSON."""


@dataclass(frozen=True, kw_only=True)
class MimicITSource(DataSource):
    """MIMIC-IT."""

    path: str = key(TEXT)
    images: str | None = key(optional(TEXT), None)  # JSON or Parquet file of the images, or a folder of files
    related_ids: str | None = key(optional(TEXT), None)  # JSON file of the related instructions; null: rel_ins_ids
    max_examples: int | None = key(optional(whole(0, 10**4)), None)  # related instructions before one; null: all


@dataclass(frozen=True, kw_only=True)
class ShapesSource(DataSource):
    """Generated images of colored shapes."""

    size: int = key(_COUNT)  # number of conversations
    split: str = key(one_of(*SPLITS))  # what they are about
    sides: tuple[int, int] | None = key(_SIDES, None)  # smallest and largest height and width; null: the encoder's size


@dataclass(frozen=True, kw_only=True)
class ProbesSource(ShapesSource):
    """Generated questions, each of one category."""

    difficulty: int = key(one_of(*LEVELS), 1)
    categories: tuple[str, ...] = key(_SOME, CATEGORIES)


@dataclass(frozen=True, kw_only=True)
class MotionSource(DataSource):
    """Generated videos of shapes that move, appear and disappear."""

    size: int = key(_COUNT)  # number of conversations
    split: str = key(one_of(*motion.SPLITS))  # what they are about


@dataclass(frozen=True, kw_only=True)
class ReachSource(DataSource):
    """Generated images of shapes under a gripper, with actions."""

    size: int = key(_COUNT)  # number of conversations
    split: str = key(one_of(*reach.SPLITS))  # for training or for validation


OWN_KEYS = ("format", "weight", "samples", "loss_weight", "loss_per", "token_weight", "path", "size", "streaming")
OWN_KEYS += ("shuffle_buffer", *(f.name for f in fields(Rules)), "min_similarity", "one_image_share")
OWN_KEYS += ("related_ids", "max_examples")
"""Keys that only a source has, not the group."""
FORMATS: dict[str, type[DataSource]] = {
    "llava_json": LlavaJSONSource,
    "hf": HFSource,
    "webdataset": RecordSource,
    "mmc4": MMC4Source,
    "obelics": ObelicsSource,
    "comm": CommSource,
    "mimic_it": MimicITSource,
    "shapes": ShapesSource,
    "probes": ProbesSource,
    "motion": MotionSource,
    "reach": ReachSource,
}


ALL_KEYS = {"clean_list", *(f.name for cls in FORMATS.values() for f in fields(cls))}
"""Keys that are neither the name of a split nor that of a source."""


@dataclass(frozen=True)
class Split:
    """The sources of a split by name. A single source has the name of the split."""

    name: str
    sources: Mapping[str, DataSource]
    clean_list: str | None  # file written by vlmtrain check --clean-list; its bad records are excluded

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """The loss weights of the sources; None if they have none."""
        given = tuple(source.loss_weight or 0.0 for source in self.sources.values())
        return given if any(given) else None

    @property
    def weighs(self) -> bool:
        """Whether some source weighs its targets in its own way."""
        return any(source.loss_per is not None or source.token_weight != 1 for source in self.sources.values())

    @property
    def repairs(self) -> bool:
        """Whether the turns of some source are repaired."""
        return any(isinstance(source, RecordSource) and source.repair for source in self.sources.values())

    def __post_init__(self) -> None:
        weighted = [source.weight is not None for source in self.sources.values()]
        for name, source in self.sources.items():
            if any(weighted) and (source.weight is None or source.samples is not None):
                key = f"data.{self.name}.{name}"
                raise ValueError(f"{key}: give all sources of this split a weight and no samples, or none a weight")
            if self.loss_weights is not None and source.loss_weight is None:
                raise ValueError(f"data.{self.name}.{name}: give all sources of this split a loss_weight, or none")
        if self.loss_weights is not None and len(self.sources) == 1:
            raise ValueError(f"data.{self.name}: a loss_weight needs several sources, got one")
        first = next(iter(self.sources.values()))
        if first.token_weight != 1 and len(self.sources) == 1:
            raise ValueError(f"data.{self.name}.token_weight={first.token_weight} needs several sources, got one")

    def refuse_streams(self, reason: str) -> None:
        """Raise ValueError with the reason if a source is streamed, for uses that need all records in any order."""
        for name, source in self.sources.items():
            if source.streaming:
                key = f"data.{self.name}" if len(self.sources) == 1 else f"data.{self.name}.{name}"
                raise ValueError(f"{key}.streaming=true cannot be used {reason}")


@dataclass(frozen=True)
class DataGroup:
    """The `data` group. `splits` maps every split to its sources, or to None if it is not set."""

    format: str  # of the sources that do not name one
    splits: Mapping[str, Split | None]

    @property
    def has_streams(self) -> bool:
        """Whether a source is streamed."""
        return any(source.streaming for split in self.splits.values() if split for source in split.sources.values())

    def split(self, name: str) -> Split:
        """The split of that name. Raises ValueError if it is not set."""
        found = self.splits.get(name)
        if found is None:
            raise ValueError(f"data.{name} is required but not set")
        return found


def read_data(given: Mapping, used: Collection[str] = ()) -> DataGroup:
    """Read the `data` group from plain values. Raises ValueError, naming the key, for invalid settings.

    used: the splits that are read; those in `PURPOSES` are also allowed.
    """
    usual = _check_format(given.get("format"), "data.format")
    allowed = {*used, *PURPOSES}
    for name in allowed & ALL_KEYS:
        raise ValueError(f"data.{name} is an option of the data group: a split cannot have its name")
    entries = {name: _entries(name, value) for name, value in given.items() if name in allowed and value is not None}
    formats = {usual}
    for sources in entries.values():
        formats |= {_check_format(entry.get("format", usual), f"{key}.format") for key, entry in sources.values()}
    known = {option: kind for name in formats for option, kind in _options(FORMATS[name]).items()}
    shared = {name: value for name, value in given.items() if name not in ("format", "clean_list", *allowed)}
    for name, value in shared.items():
        if name not in known:
            near = nearest(f"data.{name}", [f"data.{each}" for each in (*known, *allowed)])
            near = near or f" The keys of data are {', '.join(known)} and the splits"
            raise ValueError(f"unknown key 'data.{name}'.{near}")
        known[name](value, f"data.{name}")
    clean_list = optional(TEXT)(given.get("clean_list"), "data.clean_list")
    splits: dict[str, Split | None] = {name: None for name in given if name in allowed}
    for split, sources in entries.items():
        typed = {name: _source(key, {"format": usual, **entry}, shared) for name, (key, entry) in sources.items()}
        splits[split] = Split(split, MappingProxyType(typed), clean_list)
        if clean_list is not None:
            splits[split].refuse_streams(f"with data.clean_list={clean_list}: no records of it are excluded")
    return DataGroup(usual, MappingProxyType(splits))


def _options(cls: type[DataSource]) -> dict[str, Kind]:
    """The keys of a format that the `data` group may set for all its sources."""
    return {f.name: f.metadata["kind"] for f in fields(cls) if f.name not in OWN_KEYS}


def _check_format(name: object, key: str) -> str:
    if not isinstance(name, str) or name not in FORMATS:
        hint = nearest(name, FORMATS) if isinstance(name, str) else ""
        raise ValueError(f"{key}={name}: expected one of {', '.join(FORMATS)}.{hint}")
    return name


def _entries(split: str, value: object) -> dict[str, tuple[str, Mapping]]:
    """The sources of a split by name, each as its key and its options."""
    is_mixture = isinstance(value, Mapping) and not {"path", "size"} & set(value)
    if is_mixture and not value:
        raise ValueError(f"data.{split}={{}} contains no source")
    for name in value if is_mixture else ():
        if name in ALL_KEYS or get_close_matches(str(name), ("path", "size"), cutoff=0.75):
            raise ValueError(f"data.{split} has {name} but no path or size: a source cannot have the name of an option")
    found = {}
    for name, entry in value.items() if is_mixture else [(split, value)]:
        key = f"data.{split}.{name}" if is_mixture else f"data.{split}"
        options = entry if isinstance(entry, Mapping) else {"path": entry}
        if not isinstance(options.get("path", ""), str):
            raise ValueError(f"{key}={entry}: expected a path, or named sources: {{a: PATH, b: {{path: PATH, ...}}}}")
        found[name] = (key, options)
    return found


def _source(key: str, entry: Mapping, shared: Mapping) -> DataSource:
    cls = FORMATS[entry["format"]]
    if "path" in entry and "path" not in {f.name for f in fields(cls)}:
        raise ValueError(f"{key}.path={entry['path']}: format={entry['format']} takes no path; set size and split")
    inherited = {name: value for name, value in shared.items() if name in _options(cls)}
    source = read(cls, {**inherited, **entry}, f"{key}.")
    if source.streaming and source.samples is None:
        raise ValueError(f"{key}.samples is missing: {key}.streaming=true requires the number of samples per epoch")
    if not source.streaming and entry.get("shuffle_buffer") is not None:
        raise ValueError(f"{key}.shuffle_buffer={entry['shuffle_buffer']} requires {key}.streaming=true")
    return source
