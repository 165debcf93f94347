"""Interleaved documents: pages in which images stand between texts, and the rules by which they are sampled.

    record --> pieces: texts and images in reading order --> rules --> Conversation

    MMC4     {"text_list": [text], "image_info": [{"image_name" | "image_base64"}], "similarity_matrix": images x texts}
    OBELICS  {"images": [image | null], "texts": [text | null]}, one of the two at each position
    CoMM     {"title", "summary_info": [item], "step_info": [[item]]}
             with the items {"type": "text", "content"} and {"type": "image", "image_path"}

In the conversation, each run of images is a turn of the user, and the text up to the next image is the answer.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from ..errors import is_finite_number, shown
from .assignment import assigned
from .document_records import open_records
from .images import EncodedImage, ImageFolder, ImageInMemory
from .mixture import Concatenation
from .record_reader import record_name
from .records import FROM_START, IMAGE_MARK, BadSample, Conversation, Dropped, ImageSource, Turn, Window

Piece = str | ImageSource
OpenImage = Callable[[object, str], EncodedImage | None]
"""Opens an image, given what the record says and a label for messages; None if the image cannot be used."""
Reader = Callable[[Mapping, str, OpenImage], list[Piece]]
"""Returns the pieces of a record, given the record and its name. Raises BadSample."""

_IDS = ("id", "data_id", "url")
FIRST = 32
"""Number of documents whose image files are looked for when a source is opened."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How documents are sampled.

    max_images: the first ones that are kept; None for all. min_image_bytes: smaller image files are left out.
    train_first_text: whether the text before the first image is trained on. next_image: probability with which the
    texts of a document belong to the image after them instead of the one before. random_window: whether a document
    that exceeds `max_length` starts at a random place; it then ends before image ``max_images + 1``.
    """

    max_images: int | None = None
    min_image_bytes: int = 0
    train_first_text: bool = True
    next_image: float = 0.0
    random_window: bool = False


class Documents:
    """The documents of files as a sequence of conversations.

    path: see `open_records`. images: folder of their images; outside: whether paths may lead out of it. seed: of what
    is random in a document, which is the same in every epoch. read: reads the pieces of a record. joint: stands between
    the texts of an answer.

    Raises ValueError if the files cannot be read. A broken document raises BadSample when it is accessed, and one that
    the rules leave out raises Dropped.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None,
        outside: bool,
        seed: int,
        rules: Rules,
        read: Reader,
        joint: str,
    ):
        self.files = open_records(path)
        self.records = Concatenation(self.files)
        self.folder = ImageFolder(images, outside)
        self.seed, self.rules, self.read, self.joint = seed, rules, read, joint
        self._check_folder()

    def __len__(self) -> int:
        return len(self.records)

    def _check_folder(self) -> None:
        """Raise ValueError if the first documents name image files of which none exists."""
        exist: list[bool] = []

        def look(value: object, label: str, *, name: str) -> None:
            exist.append(_size(self._named(value, label, name)) is not None)

        for index in range(min(len(self), FIRST)):
            with suppress(BadSample, Dropped):
                self._pieces(index, look)
        if exist and not any(exist):
            raise ValueError(
                f"data.images={self.folder.root}: none of the {len(exist)} images that the first {FIRST} documents "
                "name exists there"
            )

    @property
    def identity(self) -> tuple:
        return tuple(file.identity for file in self.files), self.folder.root, self.seed

    def __getitem__(self, index: int) -> Conversation:
        where, name, pieces = self._pieces(index, self._image)
        return as_conversation(name, pieces, self.rules, self.joint, random.Random(f"{self.seed}/{where}"))

    def _pieces(self, index: int, image: Callable) -> tuple[str, str, list[Piece]]:
        """Where record `index` is, its name, and its pieces, whose images `image` opens."""
        where, record = self.records[index]
        if not isinstance(record, Mapping):
            raise BadSample(f"{where}: expected an object, got {shown(record)}")
        name = record_name(where, next((record[key] for key in _IDS if record.get(key) is not None), None))
        return where, name, self.read(record, name, partial(image, name=name))

    def _image(self, value: object, label: str, *, name: str) -> EncodedImage | None:
        """An image of record `name`; None if its file is missing, or if it is too small."""
        image = self._named(value, label, name)
        size = _size(image)  # many images of crawled pages can no longer be downloaded
        return image if size is not None and size >= self.rules.min_image_bytes else None

    def _named(self, value: object, label: str, name: str) -> EncodedImage:
        """An image, whose file may be missing.

        A URL stands for the file whose name is the SHA-256 of the URL, in hexadecimal digits.
        """
        if isinstance(value, str) and re.match(r"https?://", value):
            value = hashlib.sha256(value.encode()).hexdigest()
        return self.folder.read(value, label, name)


def _size(image: EncodedImage) -> int | None:
    """Size of an image in bytes; None if its file is missing."""
    if isinstance(image, ImageInMemory):
        return len(image.data)
    try:
        return os.stat(image.path).st_size
    except OSError:
        return None


def as_conversation(name: str, pieces: Sequence[Piece], rules: Rules, joint: str, rng: random.Random) -> Conversation:
    """The conversation of a document. Raises Dropped if no text follows an image."""
    if rules.max_images is not None and not rules.random_window:
        counts = accumulate(not isinstance(piece, str) for piece in pieces)
        pieces = [piece for piece, n in zip(pieces, counts) if isinstance(piece, str) or n <= rules.max_images]
    chunks: list[tuple[list[ImageSource], list[str]]] = [([], [])]
    for piece in pieces:
        if isinstance(piece, str):
            if piece.strip():
                chunks[-1][1].append(piece.strip())
        elif chunks[-1][1]:
            chunks.append(([piece], []))
        else:
            chunks[-1][0].append(piece)
    if rng.random() < rules.next_image and len(chunks) > 1:
        first, second, *others = [images for images, _ in chunks]
        moved = [first + second, *others, []]
        chunks = [(images, texts) for images, (_, texts) in zip(moved, chunks)]
    chunks = [(images, texts) for images, texts in chunks if texts]
    media = tuple(image for images, _ in chunks for image in images)
    if not media:
        raise Dropped(f"{name}: the document has no image with a text after it")
    turns: list[Turn] = []
    for number, (images, texts) in enumerate(chunks):
        is_trained = rules.train_first_text or bool(images) or number > 0
        turns.append(Turn("user", IMAGE_MARK * len(images)))
        turns.append(Turn("assistant", joint.join(texts), weight=float(is_trained)))
    window = Window(rng.random(), rules.max_images) if rules.random_window else FROM_START
    return Conversation(name, tuple(turns), media, window=window)


def mmc4_pieces(min_similarity: float, record: Mapping, name: str, image: OpenImage) -> list[Piece]:
    """The pieces of a document of MMC4 (Zhu et al., 2023): each image before the sentence that it is assigned to.

    At most one image is assigned to a sentence, so that the sum of the similarities is largest (OpenFlamingo, published
    code, which assigns only the images that can be used); without ``similarity_matrix``, the dataset's own assignment
    is taken. An image that is less similar than `min_similarity` to its sentence is left out.
    """
    sentences = [_text(text, f"text_list[{i}]", name) for i, text in enumerate(_list(record, "text_list", name))]
    infos, images = _list(record, "image_info", name), []
    for number, info in enumerate(infos):
        if not isinstance(info, Mapping):
            raise BadSample(f"{name}: 'image_info[{number}]' must be an object, got {shown(info)}")
        data, file = info.get("image_base64"), info.get("image_name")
        value = file if data is None else f"data:;base64,{data}"
        images.append(None if value is None else image(value, f"{number} of 'image_info'"))
    usable = [number for number, each in enumerate(images) if each is not None]
    if record.get("similarity_matrix") is None:
        places = [_matched(infos[number], number, len(sentences), name) for number in usable]
    else:
        similarity = _matrix(record["similarity_matrix"], (len(infos), len(sentences)), name)[usable]
        found = assigned(similarity)
        usable = [number for number, place in zip(usable, found) if place >= 0]
        places = [(place, row[place]) for place, row in zip(found, similarity) if place >= 0]
    before: list[list[Piece]] = [[] for _ in sentences]
    for number, (place, value) in zip(usable, places, strict=True):
        if value >= min_similarity:
            before[place].append(images[number])
    return [piece for own, sentence in zip(before, sentences) for piece in (*own, sentence)]


def _matched(info: Mapping, number: int, sentences: int, name: str) -> tuple[int, float]:
    """The sentence to which the dataset assigns an image, and their similarity."""
    place, value = info.get("matched_text_index"), info.get("matched_sim")
    if type(place) is not int or not 0 <= place < sentences or not is_finite_number(value):
        raise BadSample(
            f"{name}: without 'similarity_matrix', 'image_info[{number}]' needs a 'matched_text_index' below "
            f"{sentences} and a 'matched_sim', got {shown(place)} and {shown(value)}"
        )
    return place, value


def _matrix(value: object, shape: tuple[int, int], name: str) -> np.ndarray:
    try:
        found = np.array(value, float)
    except (TypeError, ValueError):
        found = np.zeros(())
    if found.size == 0 == shape[0] * shape[1]:
        found = found.reshape(shape)
    if found.shape != shape or not np.isfinite(found).all():
        raise BadSample(
            f"{name}: 'similarity_matrix' must have a row for each of the {shape[0]} images, with a number for each of "
            f"the {shape[1]} texts, got {shown(value)}"
        )
    return found


def obelics_pieces(record: Mapping, name: str, image: OpenImage) -> list[Piece]:
    """The pieces of a document of OBELICS (Laurençon et al., 2023)."""
    images, texts = (_list(record, key, name) for key in ("images", "texts"))
    if len(images) != len(texts):
        raise BadSample(f"{name}: expected 'images' and 'texts' of equal length, got {len(images)} and {len(texts)}")
    pieces = []
    for number, (shown_image, text) in enumerate(zip(images, texts)):
        if shown_image is not None and text is not None:
            got = f"{shown(shown_image)} and {shown(text)}"
            raise BadSample(f"{name}: one of 'images[{number}]' and 'texts[{number}]' must be null, got {got}")
        if text is not None:
            pieces.append(_text(text, f"texts[{number}]", name))
        elif shown_image is not None:
            pieces.append(image(shown_image, f"{number} of 'images'"))
    return [piece for piece in pieces if piece is not None]


def comm_pieces(record: Mapping, name: str, image: OpenImage) -> list[Piece]:
    """The pieces of a document of CoMM (Chen et al., 2024): its title, its summary and its steps."""
    parts = {f"step_info[{number}]": step for number, step in enumerate(_list(record, "step_info", name))}
    if record.get("summary_info") is not None:
        parts = {"summary_info": record["summary_info"], **parts}
    pieces = [] if record.get("title") is None else [_text(record["title"], "title", name)]
    for part in parts:
        for number, item in enumerate(_list(parts, part, name)):
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "text":
                pieces.append(_text(item.get("content"), f"{part}[{number}].content", name))
            elif kind == "image":
                pieces.append(image(item.get("image_path"), f"of '{part}[{number}].image_path'"))
            else:
                raise BadSample(f"{name}: '{part}[{number}]' must be an item of type text or image, got {shown(item)}")
    return [piece for piece in pieces if piece is not None]


def _list(record: Mapping, key: str, name: str) -> list:
    if not isinstance(record.get(key), list):
        raise BadSample(f"{name}: '{key}' must be a list, got {shown(record.get(key))}")
    return record[key]


def _text(value: object, key: str, name: str) -> str:
    if not isinstance(value, str):
        raise BadSample(f"{name}: '{key}' must be a string, got {shown(value)}")
    return value
