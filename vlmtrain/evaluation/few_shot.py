"""Few-shot evaluation: demonstrations, earlier turns of the conversation that answer other questions.

records of another split -> first exchange of each -> those drawn for a question -> turns before it
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from ..data.encoded import Encoded
from ..data.images import EncodedImage
from ..data.processor import Processor
from ..data.records import (
    IMAGE_MARK,
    BadSample,
    Conversation,
    Dropped,
    ImageSource,
    Source,
    Turn,
    VideoSource,
    action_marks,
    check_conversation,
    region_marks,
)
from ..data.video import FrameSequence


class Demonstrations:
    """The records of a split as demonstrations: the first question and answer of each, with the media they show.

    Those of a question depend on the seed, the index of its conversation in the held-out data and their number; fewer
    are the first of more. A record that asks one of the conversation's own questions about the same media is never
    drawn. name: of the split. shots: numbers of demonstrations, 0 first. skip_bad: draw others instead of broken
    records. nearest: the records for a conversation, nearest first, where they are chosen by similar images (`rices`).

    Raises ValueError if the split has too few records.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        shots: Sequence[int],
        seed: int = 0,
        rices: bool = False,
        skip_bad: bool = False,
    ):
        self.source, self.name, self.shots = source, name, tuple(shots)
        self.seed, self.rices, self.skip_bad = seed, rices, skip_bad
        self.nearest: dict[int, list[int]] = {}
        if len(source) < self.shots[-1]:
            raise ValueError(
                f"validation.shots={list(self.shots)} needs {self.shots[-1]} records, but data.{name} has {len(source)}"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Conversation:
        """A record as a demonstration. Raises BadSample, naming the split."""
        try:
            conversation = self.source[number]
            check_conversation(conversation)
            for medium in conversation.media if self.skip_bad else ():
                if isinstance(medium, Encoded | FrameSequence):
                    medium.check()
        except BadSample as error:
            raise type(error)(f"a demonstration of data.{self.name}: {error}") from None
        return first_exchange(conversation)

    def before(self, index: int, conversation: Conversation, count: int) -> tuple[Conversation, ...]:
        """The demonstrations before conversation `index` of the held-out data, in the order of the prompt.

        Raises BadSample for a broken one, and ValueError if there are fewer than `count`.
        """
        if index in self.nearest:
            found = [self[number] for number in reversed(self.nearest[index][:count])]
        else:
            found = list(islice(self._drawn(index, conversation), count))
        if len(found) < count:
            of = "with other images" if self.rices else "other than its own questions"
            raise ValueError(
                f"validation.shots: {conversation.id} needs {count} demonstrations, but data.{self.name} has only "
                f"{len(found)} {of}"
            )
        return tuple(found)

    def _drawn(self, index: int, conversation: Conversation) -> Iterator[Conversation]:
        draws, seen = random.Random(f"{self.seed}/{index}"), set()
        while len(seen) < len(self):
            number = draws.randrange(len(self))
            if number in seen:
                continue
            seen.add(number)
            try:
                shot = self[number]
            except BadSample as error:
                if not self.skip_bad and not isinstance(error, Dropped):
                    raise
                continue
            if not asks_the_same(shot, conversation):
                yield shot


def first_exchange(conversation: Conversation) -> Conversation:
    """The first question and answer of a conversation, with the media, regions and actions in them."""
    asked, answered = [turn for turn in conversation.turns if turn.role != "system"][:2]
    regions = conversation.regions[: sum(len(region_marks(turn)) for turn in (asked, answered))]
    media = conversation.media[: asked.text.count(IMAGE_MARK)]
    turns = Turn("user", asked.text), Turn("assistant", answered.text)
    actions = conversation.actions[: action_marks(answered)]
    return Conversation(conversation.id, turns, media, regions=regions, actions=actions)


def preceded(conversation: Conversation, shots: Sequence[Conversation]) -> Conversation:
    """A conversation after demonstrations, whose answers have no loss weight; a system turn stays first."""
    if not shots:
        return conversation
    first = sum(turn.role == "system" for turn in conversation.turns[:1])
    turns = [replace(turn, weight=0.0) for shot in shots for turn in shot.turns]
    media, regions, actions = [], [], []
    for each in (*shots, conversation):
        regions += [region._replace(medium=len(media) + region.medium) for region in each.regions]
        media += each.media
        actions += each.actions
    turns = (*conversation.turns[:first], *turns, *conversation.turns[first:])
    return replace(conversation, turns=turns, media=tuple(media), regions=tuple(regions), actions=tuple(actions))


def asks_the_same(shot: Conversation, conversation: Conversation) -> bool:
    """Whether a demonstration is one of the questions of a conversation, about the same media."""
    asked, shown = _words(shot.turns[0]), 0
    for turn in conversation.turns:
        if turn.role != "user":
            continue
        shown += turn.text.count(IMAGE_MARK)
        if _words(turn) == asked and len(shot.media) == shown and all(map(_are_same, shot.media, conversation.media)):
            return True
    return False


def _words(turn: Turn) -> list[str]:
    return turn.text.replace(IMAGE_MARK, " ").split()


def _are_same(one: ImageSource | VideoSource, other: ImageSource | VideoSource) -> bool:
    """Whether two media are equal, or images with the same bytes. Raises BadSample if these cannot be read."""
    if one == other or not (isinstance(one, EncodedImage) and isinstance(other, EncodedImage)):
        return one == other
    return all(_content(one, whole) == _content(other, whole) for whole in (False, True))


def _content(image: EncodedImage, whole: bool) -> bytes | tuple[bytes, bytes]:
    """All bytes of an image, or the first and the last ones."""
    with image.naming_failures():
        if not whole:
            return image.ends()
        with image.open() as file:
            return file.read()


def why_zero_shot(processor: Processor) -> str | None:
    """Why the template of a model cannot render demonstrations; None if it can."""
    renderer, exchange = processor.renderer, (Turn("user", "question"), Turn("assistant", "answer"))
    if processor.in_pairs:
        return "a sample is one image and one text"
    if renderer.decoder_start is not None:
        return "an encoder-decoder language model answers one question per sample"
    if renderer.shows_captions:
        return f"template={renderer.template} renders one exchange"
    if renderer.images_first:
        return f"template={renderer.template} puts images first"
    try:
        renderer.template_texts(exchange * 2)
    except ValueError as error:
        return f"template={renderer.template} renders one exchange: {error}"
    return None
