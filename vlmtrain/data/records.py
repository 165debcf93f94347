"""The common form of all data formats: a conversation with images."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from .actions import ACTION_MARK, Action, Binning
from .regions import REGION_MARK, Place, Region

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
_SURROGATE = re.compile("[\ud800-\udfff]")


class VideoFacts(NamedTuple):
    """What is known of a video without decoding it.

    times: of its frames, float64 ``(N,)`` seconds from the first one, ascending. duration: from the start of the first
    frame to the end of the last one, in seconds. size ``(H, W)``: of its upright frames.
    """

    times: np.ndarray
    duration: float
    size: tuple[int, int]

    @property
    def rate(self) -> float:
        """Average number of frames per second."""
        return len(self.times) / self.duration


class VideoSource(Protocol):
    """A source of a video, which is opened in the data loader's worker. The methods raise `BadSample`."""

    def probe(self) -> VideoFacts:
        """The times of its frames and their size, without decoding it."""

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Decode the frames with these numbers, which are ascending, one after another, as RGB."""


class ImageSource(Protocol):
    """A source of one image, which is opened in the data loader's worker."""

    def load(self) -> Image.Image:
        """Decode the image as RGB. Raises `BadSample` if it is missing or broken."""

    def size(self) -> tuple[int, int]:
        """Size ``(H, W)`` of the loaded image, without decoding it if possible. Raises `BadSample`."""


@dataclass(frozen=True)
class Grading:
    """Annotations of an assistant turn that only evaluation uses.

    category: kind of question, which is reported separately. answers: of several annotators (VQA has ten). captions:
    reference captions that are equivalent to the text. choices: options of a multiple-choice question, one of which is
    the text. problem: why evaluation cannot use the annotations. places: of the boxes and points in the text. actions:
    how the actions in the text are written; None if it has none.
    """

    category: str | None = None
    answers: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    problem: str | None = None
    places: tuple[Place, ...] = ()
    actions: Binning | None = None


UNGRADED = Grading()


class Window(NamedTuple):
    """Which part of a document ``template=interleaved`` shows.

    start: of the part if the document exceeds `max_length`, as a fraction in [0, 1) of all possible starts. images:
    maximum number of images, before another of which the part ends; None for any number.
    """

    start: float = 0.0
    images: int | None = None


FROM_START = Window()


@dataclass(frozen=True)
class Turn:
    """One utterance. `role` is ``system``, ``user`` or ``assistant``; `weight` is the loss weight of its tokens."""

    role: str
    text: str
    grading: Grading = UNGRADED
    weight: float = 1.0


@dataclass(frozen=True, init=False)
class Conversation:
    """One sample: turns in order, and the media that correspond to the marks in the user's turns.

    media: images and videos, not decoded; ``images=`` is another name of the argument, and replaces `media`. Each has
    a mark ``<image>``; with videos, ``<video>`` is the same mark, and is replaced by it. unused: keys of the record
    that were not read. repaired: whether turns were dropped or joined. others: the turns of further dialogues about the
    same media, which do not see each other. regions: boxes and points in images, in the order of their marks ``<box>``
    and ``<point>``. actions: vectors, in the order of the marks ``<action>`` in the answers. With several dialogues,
    there are no regions and actions. window: of a document.
    """

    id: str
    turns: tuple[Turn, ...]
    media: tuple[ImageSource | VideoSource, ...]
    unused: tuple[str, ...]
    repaired: bool
    others: tuple[tuple[Turn, ...], ...]
    regions: tuple[Region, ...]
    window: Window
    actions: tuple[Action, ...]

    def __init__(
        self,
        id: str,
        turns: tuple[Turn, ...],
        media: Sequence[ImageSource | VideoSource] = (),
        unused: tuple[str, ...] = (),
        repaired: bool = False,
        others: tuple[tuple[Turn, ...], ...] = (),
        *,
        images: Sequence[ImageSource] | None = None,
        regions: Sequence[Region] = (),
        window: Window = FROM_START,
        actions: Sequence[Action] = (),
    ):
        media = tuple(media if images is None else images)
        if any(map(is_video, media)):
            turns, *others = (
                tuple(_with_one_mark(turn) if turn.role == "user" else turn for turn in told)
                for told in (turns, *others)
            )
        values = {"id": id, "turns": turns, "media": media, "unused": unused, "repaired": repaired}
        values |= {"others": tuple(others), "regions": tuple(regions), "window": window, "actions": tuple(actions)}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The images among the media."""
        return tuple(medium for medium in self.media if not is_video(medium))

    @property
    def dialogues(self) -> tuple[Conversation, ...]:
        """Each dialogue as a conversation of its own."""
        if not self.others:
            return (self,)
        spoken = enumerate((self.turns, *self.others), 1)
        return tuple(
            Conversation(f"{self.id} dialogue {number}", turns, self.media, self.unused, self.repaired)
            for number, turns in spoken
        )


def is_video(medium: ImageSource | VideoSource) -> bool:
    """Whether a medium is a video rather than an image."""
    return hasattr(medium, "probe")


def _with_one_mark(turn: Turn) -> Turn:
    return replace(turn, text=turn.text.replace(VIDEO_MARK, IMAGE_MARK)) if VIDEO_MARK in turn.text else turn


def region_marks(turn: Turn) -> list[str]:
    """The marks of boxes and points in a turn; the system's turn has none."""
    return [] if turn.role == "system" else REGION_MARK.findall(turn.text)


def action_marks(turn: Turn) -> int:
    """The number of marks of actions in a turn; only the assistant's have any."""
    return turn.text.count(ACTION_MARK) if turn.role == "assistant" else 0


class BadSample(ValueError):
    """A record that cannot be trained on; the message names the record and the reason."""


class Dropped(BadSample):
    """A document that the sampling rules leave out, which is not an error in the data."""


def check_conversation(conversation: Conversation) -> None:
    """Raise BadSample, naming the conversation, unless its turns alternate and its marks match its images."""
    if conversation.others:
        for dialogue in conversation.dialogues:
            check_conversation(dialogue)
        return
    roles = [turn.role for turn in conversation.turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if len(spoken) < 2 or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadSample(
            f"{conversation.id}: turns must alternate user, assistant (a system turn may come first); got {roles}"
        )
    for turn in conversation.turns:
        if turn.role == "assistant" and not turn.text.strip():
            raise BadSample(f"{conversation.id}: an answer is empty")
    check_content(conversation)


def check_content(conversation: Conversation) -> None:
    """Raise BadSample, naming the conversation, unless its marks match its images and its text is valid Unicode."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in conversation.turns if turn.role == "user")
    if marks != len(conversation.media):
        hint = "" if marks else "; data.prepend_missing_marks=true puts images before the first question"
        held = f"{len(conversation.images)} images"
        if videos := len(conversation.media) - len(conversation.images):
            held += f" and {videos} videos"
        raise BadSample(f"{conversation.id}: {marks} {IMAGE_MARK} marks in the user's turns, but {held}{hint}")
    for turn in conversation.turns:
        if _SURROGATE.search(turn.text):
            raise BadSample(f"{conversation.id}: the text contains half of a character (a lone surrogate)")


class StreamError(ValueError):
    """A stream that cannot be read any further; the message names the data set, the record and the reason."""

    def __init__(self, message: str):
        # PyTorch's data loader passes the traceback of a worker, which ends with the message
        super().__init__(message.rstrip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Source(Protocol):
    """A sequence of conversations; a broken one raises BadSample when it is accessed.

    A source of files may have an ``identity``, which changes with the files: what is stored about its records then
    serves other runs.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


class Stream(ABC):
    """A source without an end, which is read in its own order.

    Its length is the number of records per epoch; the records from ``len(self)`` on belong to the following epochs.
    Indices should increase, because all records before an index are read first. An access raises StreamError if its
    files cannot be read. note: what a user must know, in one line.
    """

    note: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Conversation: ...

    @abstractmethod
    def close(self) -> None:
        """Close the files that this process has open. The next access opens them again."""
