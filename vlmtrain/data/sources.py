"""Opens the sources of a split, as configured in the `data` group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Subset

from ..errors import first_line
from ..settings.data import (
    CommSource,
    DataSource,
    DocumentSource,
    HFSource,
    LlavaJSONSource,
    MimicITSource,
    MMC4Source,
    MotionSource,
    ObelicsSource,
    ProbesSource,
    ReachSource,
    RecordSource,
    ShapesSource,
    Split,
)
from . import motion, probes, reach, shapes
from .encoded import Encoded
from .interleaved import Documents, Rules, comm_pieces, mmc4_pieces, obelics_pieces
from .llava import open_llava
from .mimic_it import MimicIT
from .mixture import Concatenation, Mixture
from .motion import Motion
from .probes import Probes
from .reach import Reach
from .records import BadSample, Dropped, Source, Stream, check_conversation, is_video
from .shapes import Shapes
from .video import FrameSequence, VideoFolder

LOOKED_AT = 20_000  # number of records of a source that are checked before training; `vlmtrain check` reads all
STREAM_LOOKED_AT = 1_000  # of a stream, the first ones, since evenly spaced ones would require reading all
VIDEOS_LOOKED_AT = 200  # number of videos that are checked before training, since all of their packets are read


def build_source(split: Split, image_size: tuple[int, int], seed: int) -> Mixture:
    """Open the sources of a split.

    image_size: of the encoder, ``(H, W)``, for generated data. Raises ValueError if a source cannot be opened.
    """
    sources = {name: _OPENERS[type(each)](each, image_size, seed) for name, each in split.sources.items()}
    if split.clean_list is not None:
        sources = _without_bad(sources, Path(split.clean_list), split.name)
    identities = {name: _identity(source, split.sources[name]) for name, source in sources.items()}
    shares = [getattr(source, "one_image_share", None) for source in split.sources.values()]
    weighing = [(source.loss_per, source.token_weight) for source in split.sources.values()]
    return Mixture(sources, _counts(sources, split.sources), seed, identities, split.loss_weights, weighing, shares)


def _identity(source: Source, settings: DataSource) -> object:
    """What identifies the records of a source; None if they are not read from files."""
    files = _identity_of_files(source)
    plain = replace(settings, weight=None, samples=None, loss_weight=None, loss_per=None, token_weight=1.0)
    return None if files is None else (plain, files)


def _identity_of_files(source: Source) -> object:
    if isinstance(source, Subset):
        inner = _identity_of_files(source.dataset)
        return None if inner is None else (inner, hashlib.sha256(np.array(source.indices)).hexdigest())
    if isinstance(source, Concatenation):
        parts = tuple(map(_identity_of_files, source.parts))
        return None if None in parts else parts
    return getattr(source, "identity", None)


def _open_llava(source: LlavaJSONSource, image_size: tuple[int, int], seed: int) -> Source:
    return open_llava(source.path, source.images, seed, source.outside_images, **_reading(source))


def _open_hf(source: HFSource, image_size: tuple[int, int], seed: int) -> Source:
    from .hf_dataset import HFDataset
    from .hf_stream import BUFFER, HFStream

    place = (source.path, source.split, source.name, source.columns, source.images, source.outside_images)
    if not source.streaming:
        return HFDataset(*place, **_reading(source))
    order = (source.samples, source.shuffle_buffer or BUFFER, seed)
    return HFStream(*place, *order, **_reading(source))


def _open_webdataset(source: RecordSource, image_size: tuple[int, int], seed: int) -> Source:
    from .webdataset import WebDataset

    return WebDataset(source.path, **_reading(source))


def _open_documents(source: DocumentSource, image_size: tuple[int, int], seed: int) -> Source:
    rules = Rules(**{f.name: getattr(source, f.name) for f in fields(Rules)})
    if isinstance(source, MMC4Source):
        pieces, joint = partial(mmc4_pieces, source.min_similarity), " "
    else:
        pieces, joint = {ObelicsSource: (obelics_pieces, "\n\n"), CommSource: (comm_pieces, " ")}[type(source)]
    return Documents(source.path, source.images, source.outside_images, seed, rules, pieces, joint)


def _open_mimic_it(source: MimicITSource, image_size: tuple[int, int], seed: int) -> Source:
    return MimicIT(source.path, source.images, source.related_ids, source.max_examples)


def _open_shapes(source: ShapesSource, image_size: tuple[int, int], seed: int) -> Source:
    return Shapes(source.split, source.size, min(image_size), seed, source.sides)


def _open_probes(source: ProbesSource, image_size: tuple[int, int], seed: int) -> Source:
    own = (source.difficulty, source.categories, source.sides)
    return Probes(source.split, source.size, min(image_size), seed, *own)


def _open_motion(source: MotionSource, image_size: tuple[int, int], seed: int) -> Source:
    return Motion(source.split, source.size, min(image_size), seed)


def _open_reach(source: ReachSource, image_size: tuple[int, int], seed: int) -> Source:
    return Reach(source.split, source.size, min(image_size), seed)


_OPENERS: dict[type[DataSource], Callable[..., Source]] = {
    LlavaJSONSource: _open_llava,
    HFSource: _open_hf,
    RecordSource: _open_webdataset,
    MMC4Source: _open_documents,
    ObelicsSource: _open_documents,
    CommSource: _open_documents,
    MimicITSource: _open_mimic_it,
    ShapesSource: _open_shapes,
    ProbesSource: _open_probes,
    MotionSource: _open_motion,
    ReachSource: _open_reach,
}


def _reading(source: RecordSource) -> dict:
    """How the records of a source are read, as options of `RecordReader`."""
    options = {"ignored": source.ignore, "images_first": source.prepend_missing_marks, "repair": source.repair}
    if isinstance(source, LlavaJSONSource):
        options["videos"] = VideoFolder(source.videos, source.frames_fps, source.outside_images)
    return options


def vocabulary(format: str) -> tuple[str, ...]:
    """The vocabulary of a format of generated data; that of the shapes for all other data."""
    own = {"probes": probes.VOCABULARY, "motion": motion.VOCABULARY, "reach": reach.VOCABULARY}
    return own.get(format, shapes.VOCABULARY)


def _counts(opened: Mapping[str, Source], sources: Mapping[str, DataSource]) -> dict[str, int]:
    """Number of records per epoch from each source: all, `samples`, or a share by `weight` of the total number."""
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    if not weights:
        return {name: source.samples or len(opened[name]) for name, source in sources.items()}
    total, everything = sum(map(len, opened.values())), sum(weights.values())
    return {name: max(1, round(total * weight / everything)) for name, weight in weights.items()}


def _without_bad(sources: Mapping[str, Source], file: Path, split: str) -> dict[str, Source]:
    """Sources without the records that ``vlmtrain check --clean-list`` found to be bad."""
    try:
        listed = json.loads(file.read_text()).get(split)
        if listed is None:
            raise ValueError(f"it has no entry for data.{split}")
        records = {name: (entry["records"], frozenset(entry["bad"])) for name, entry in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"data.clean_list={file} is not a list written by vlmtrain check: {first_line(error)}"
        ) from None
    clean = {}
    for name, source in sources.items():
        size, bad = records.get(name, (None, frozenset()))
        if size != len(source) or not all(isinstance(index, int) and 0 <= index < size for index in bad):
            raise ValueError(
                f"data.clean_list={file} was written for {size} records of data.{split} ({name}), but there are "
                f"{len(source)}: run vlmtrain check again"
            )
        clean[name] = Subset(source, [index for index in range(size) if index not in bad])
        if not len(clean[name]):
            raise ValueError(f"data.clean_list={file} excludes all records of data.{split} ({name})")
    return clean


class FirstLook(NamedTuple):
    """What a look at the records of a source found: `problems` of bad records, and how many others were `repaired`."""

    problems: list[str]
    repaired: int
    records: int


def first_look(source: Source, limit: int = 1) -> FirstLook:
    """Check a source up to its bad record number `limit`; of a large source, evenly spaced records.

    Of a stream, the first records are checked. Images are not decoded if their first and last bytes are conclusive.
    Videos are not decoded, and only the first ones are checked.
    """
    problems, repaired, records, videos = [], 0, 0, 0
    for index in _looked_at(source):
        name = f"record {index}"
        try:
            conversation = source[index]
            name = conversation.id
            records, repaired = records + 1, repaired + conversation.repaired
            check_conversation(conversation)
            for medium in conversation.media:
                videos += is_video(medium)
                if isinstance(medium, Encoded | FrameSequence) and not (is_video(medium) and videos > VIDEOS_LOOKED_AT):
                    medium.check()
        except Dropped:
            continue
        except BadSample as error:
            problems.append(str(error) if name in str(error) else f"{name}: {error}")
            if len(problems) == limit:
                break
    return FirstLook(problems, repaired, records)


def _looked_at(source: Source) -> Iterator[int]:
    start, step = 0, max(1, len(source) // LOOKED_AT)
    for part in source.sources.values() if isinstance(source, Mixture) else [source]:
        end = start + len(part)
        if isinstance(part, Stream):
            yield from range(start, min(end, start + STREAM_LOOKED_AT))
        else:
            yield from range(start, end, step)
        start = end
