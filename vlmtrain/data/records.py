"""The one form that every data format is read into: a conversation with pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

IMAGE_MARK = "<image>"


class ImageSource(Protocol):
    """Something that yields one picture; opening is left to the loader's worker."""

    def load(self) -> Image.Image:
        """Decode the picture as RGB. Raises `BadSample` if it is missing or broken."""
        ...

    def size(self) -> tuple[int, int]:
        """``(H, W)`` of what `load` gives, without decoding it where possible. Raises `BadSample`."""
        ...


@dataclass(frozen=True)
class Grading:
    """What a record says of an assistant's turn for evaluation alone; training does not look at it.

    category: a kind of question, reported by itself. answers: of several people (VQA has ten). captions: descriptions
    that are as good as the text. choices: of which the text is one.
    """

    category: str | None = None
    answers: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


UNGRADED = Grading()


@dataclass(frozen=True)
class Turn:
    """One utterance. `role` is ``system``, ``user`` or ``assistant``."""

    role: str
    text: str
    grading: Grading = UNGRADED


@dataclass(frozen=True)
class Conversation:
    """One sample: turns in order, and the pictures that their ``<image>`` marks stand for."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()


class BadSample(ValueError):
    """A record that cannot be trained on; the message names the record and the reason."""


class Source(Protocol):
    """A sequence of conversations; a broken one raises BadSample when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...
