"""Data sources of a stage, as configured in the `data` group for each split.

A split is one source or several named sources, each with the keys that differ from those of the group:

    data.instruct: chats.json
    data.instruct: {chats: chats.json, captions: {format: webdataset, path: captions/, samples: 100000}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch.utils.data import Subset

from ..errors import first_line, nearest
from . import probes, shapes
from .images import EncodedImage
from .llava import open_llava
from .mixture import Mixture
from .probes import CATEGORIES, LEVELS, Probes
from .records import BadSample, Source
from .rendering import check_conversation
from .shapes import SPLITS, Shapes

PURPOSES = ("caption", "text", "align", "instruct", "knowledge", "multitask", "validation")
"""Splits that the `data` group may contain, whether or not a recipe uses them."""
MOST_DRAWS = 10**10
LOOKED_AT = 20_000  # number of records of a source that are checked before training; `vlmtrain check` reads all


def build_source(data: Mapping, split: str, image_size: tuple[int, int], seed: int) -> Mixture:
    """Build the source of a split (a key of the `data` group). Raises ValueError, naming the key, for invalid settings.

    image_size: of the encoder, ``(H, W)``, for procedural data.
    """
    if data.get(split) is None:
        raise ValueError(f"data.{split} is required but not set")
    named = _named(data, split)
    if not named:
        raise ValueError(f"data.{split}={{}} contains no source")
    sources, wanted = {}, {}
    for name, entry in named.items():
        key = f"data.{split}.{name}" if named is data[split] else f"data.{split}"
        options = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
        if not isinstance(options.get("path", ""), str):
            raise ValueError(f"{key}={entry}: expected a path, or named sources: {{a: PATH, b: {{path: PATH, ...}}}}")
        wanted[name] = {amount: options.pop(amount) for amount in ("weight", "samples") if amount in options}
        sources[name] = _open({**data, **options}, set(options), key, image_size, seed)
    if data.get("clean_list") is not None:
        sources = _without_bad(sources, Path(str(data["clean_list"])), split)
    return Mixture(sources, _counts(sources, wanted, f"data.{split}"), seed)


def check_keys(data: Mapping, splits: Collection[str]) -> None:
    """Raise ValueError for a key of the `data` group that is neither an option of some format nor a split.

    splits: those that the run's stages read; the splits in `PURPOSES` are also allowed.
    """
    if not isinstance(data.get("format"), str):
        raise ValueError(f"data.format={data.get('format')}: expected one of {', '.join(FORMATS)}")
    entries = [entry for split in splits for entry in _named(data, split).values() if isinstance(entry, Mapping)]
    formats = {data["format"], *(entry["format"] for entry in entries if "format" in entry)}
    options = {option for name in formats if name in FORMATS for option in FORMATS[name][2]}
    known = {"format", "clean_list", *options, *PURPOSES, *splits}
    for name in data:
        if name not in known:
            raise ValueError(f"unknown key 'data.{name}'.{nearest(name, known)}")


def _named(data: Mapping, split: str) -> Mapping:
    """The sources of a split by name. A single source, whose options include its location, has the split's name."""
    entry = data.get(split)
    is_mixture = isinstance(entry, Mapping) and not {"path", "size"} & set(entry)
    return entry if is_mixture else {split: entry}


def _open(options: Mapping, given: set[str], key: str, image_size: tuple[int, int], seed: int) -> Source:
    name = options["format"]
    if name not in FORMATS:
        raise ValueError(f"{key}: unknown format '{name}'.{nearest(name, FORMATS)} Available: {', '.join(FORMATS)}")
    opener, needed, known = FORMATS[name]
    allowed = {needed, "format", "weight", "samples", *known}
    strange = sorted(given - allowed)
    if strange:
        raise ValueError(f"{key} has no option '{strange[0]}'.{nearest(strange[0], allowed)}")
    if options.get(needed) is None:
        raise ValueError(f"{key}.{needed} is not set")
    if needed == "size":
        _check_procedural(options, given, key)
    for switch in ("outside_images", "prepend_missing_marks", "repair"):
        if not isinstance(options.get(switch, False), bool):
            raise ValueError(f"data.{switch}={options[switch]}: expected true or false")
    if not isinstance(options.get("images"), str | None):
        raise ValueError(f"data.images={options['images']}: expected a folder")
    ignored = options.get("ignore", [])
    if not isinstance(ignored, list | tuple) or not all(isinstance(name, str) for name in ignored):
        raise ValueError(f"data.ignore={ignored}: expected a list of keys")
    return opener(options, image_size, seed)


def _check_procedural(options: Mapping, given: set[str], key: str) -> None:
    """Raise ValueError for an option of procedural data that is out of bounds. given: the options at `key`."""
    names, size, split = options.get("categories", CATEGORIES), options["size"], options.get("split")
    if type(size) is not int or not 0 < size < MOST_DRAWS:
        raise ValueError(f"{key}.size={size}: expected an integer above 0 and below {MOST_DRAWS:,}")
    if split not in SPLITS:
        raise ValueError(f"{key}.split={split}: expected one of {', '.join(SPLITS)}")
    if type(options.get("difficulty", 1)) is not int or options.get("difficulty", 1) not in LEVELS:
        place = key if "difficulty" in given else "data"
        raise ValueError(f"{place}.difficulty={options['difficulty']}: expected one of {', '.join(map(str, LEVELS))}")
    if not isinstance(names, list | tuple) or not names or not all(name in CATEGORIES for name in names):
        place = key if "categories" in given else "data"
        raise ValueError(f"{place}.categories={names}: expected a list of some of {', '.join(CATEGORIES)}")


def _reading(options: Mapping) -> dict:
    """How the records of a source are read, as options of `RecordReader`."""
    return {
        "ignored": tuple(options.get("ignore", ())),
        "images_first": options.get("prepend_missing_marks", False),
        "repair": options.get("repair", False),
    }


def _open_llava(options: Mapping, image_size: tuple[int, int], seed: int) -> Source:
    outside = options.get("outside_images", False)
    return open_llava(options["path"], options.get("images"), seed, outside, **_reading(options))


def _open_hf(options: Mapping, image_size: tuple[int, int], seed: int) -> Source:
    from .hf_dataset import HFDataset

    names = (options.get("split", "train"), options.get("name"), options.get("columns"))
    folder = (options.get("images"), options.get("outside_images", False))
    return HFDataset(options["path"], *names, *folder, **_reading(options))


def _open_webdataset(options: Mapping, image_size: tuple[int, int], seed: int) -> Source:
    from .webdataset import WebDataset

    return WebDataset(options["path"], **_reading(options))


def _open_shapes(options: Mapping, image_size: tuple[int, int], seed: int) -> Source:
    return Shapes(options["split"], options["size"], min(image_size), seed)


def _open_probes(options: Mapping, image_size: tuple[int, int], seed: int) -> Source:
    more = (options.get("difficulty", 1), options.get("categories", CATEGORIES))
    return Probes(options["split"], options["size"], min(image_size), seed, *more)


def vocabulary(data: Mapping) -> tuple[str, ...]:
    """The vocabulary of the procedural data in a `data` group; that of the shapes for all other data."""
    return probes.VOCABULARY if data["format"] == "probes" else shapes.VOCABULARY


READING = ("ignore", "prepend_missing_marks", "repair")
"""Options of all formats that read records."""
Opener = Callable[[Mapping, tuple[int, int], int], Source]
FORMATS: dict[str, tuple[Opener, str, tuple[str, ...]]] = {
    "llava_json": (_open_llava, "path", ("images", "outside_images", *READING)),
    "hf": (_open_hf, "path", ("images", "outside_images", "columns", "split", "name", *READING)),
    "webdataset": (_open_webdataset, "path", READING),
    "shapes": (_open_shapes, "size", ("split",)),
    "probes": (_open_probes, "size", ("split", "difficulty", "categories")),
}
"""Format: the function that opens it, the option with its location or size, and its other options."""


def _counts(sources: Mapping[str, Source], wanted: Mapping[str, Mapping], key: str) -> dict[str, int]:
    """Number of records per epoch from each source: all, `samples`, or a share by `weight` of the total number."""
    for name, amounts in wanted.items():
        for amount, value in amounts.items():
            whole = amount == "weight" or isinstance(value, int)
            sane = not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < MOST_DRAWS
            if not sane or not whole:
                number = "an integer" if amount == "samples" else "a number"
                raise ValueError(f"{key}.{name}.{amount}={value}: expected {number} above 0 and below {MOST_DRAWS:,}")
    weights = {name: amounts["weight"] for name, amounts in wanted.items() if "weight" in amounts}
    if not weights:
        return {name: amounts.get("samples", len(sources[name])) for name, amounts in wanted.items()}
    others = sorted(set(sources) - set(weights)) or sorted(name for name, amounts in wanted.items() if len(amounts) > 1)
    if others:
        raise ValueError(f"{key}.{others[0]}: either all sources have a weight, or none of them")
    total, everything = sum(len(source) for source in sources.values()), sum(weights.values())
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


def first_problems(source: Source, limit: int = 1) -> list[str]:
    """Problems of the first `limit` bad records of a source; in a large source, evenly spaced records are checked.

    Images are not decoded if their first and last bytes are conclusive.
    """
    problems = []
    step = max(1, len(source) // LOOKED_AT)
    for index in range(0, len(source), step):
        name = f"record {index}"
        try:
            conversation = source[index]
            name = conversation.id
            check_conversation(conversation)
            for image in conversation.images:
                if isinstance(image, EncodedImage):
                    image.check()
        except BadSample as error:
            problems.append(str(error) if name in str(error) else f"{name}: {error}")
            if len(problems) == limit:
                break
    return problems
