"""Where a stage's conversations come from: the `data` group's choice, by split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from .images import ImageOnDisk
from .llava import LlavaJson
from .records import BadSample, Conversation
from .rendering import check_conversation
from .shapes import Shapes


class Source(Protocol):
    """A sequence of conversations; a broken one raises BadSample when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


def build_source(data: Mapping, split: str, image_size: tuple[int, int], seed: int) -> Source:
    """The conversations of a split (a key of the `data` group). Raises ValueError if it is not set.

    image_size: of the encoder, ``(H, W)``, for data that is drawn to measure.
    """
    if data.get(split) is None:
        raise ValueError(f"data.{split} is not set, but a stage needs it")
    if data["format"] == "shapes":
        options = data[split]
        return Shapes(options["split"], options["size"], min(image_size), seed)
    return LlavaJson(data[split], data["images"])


def first_problems(source: Source, limit: int = 1) -> list[str]:
    """What is wrong with the first `limit` bad records, without decoding every picture."""
    problems = []
    for index in range(len(source)):
        name = f"record {index}"
        try:
            conversation = source[index]
            name = conversation.id
            check_conversation(conversation)
            for image in conversation.images:
                if isinstance(image, ImageOnDisk):
                    image.check()
        except BadSample as error:
            problems.append(str(error) if name in str(error) else f"{name}: {error}")
            if len(problems) == limit:
                break
    return problems
