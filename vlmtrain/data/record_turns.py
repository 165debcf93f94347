"""The turns of a record: those of its messages, of its question and answer, or of its caption."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import first_line, is_finite_number, shown
from .grading import GRADING, read_grading
from .images import ImageFolder
from .record_keys import refuse_if_needed
from .record_media import ITEM_IMAGES, MEDIA, Mark, Said, item_image, item_video, marks_of, media_first, user_said
from .records import IMAGE_MARK, BadSample, Turn
from .video import VideoFolder

SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"},
    "system": "system",
}
WEIGHTS = ("weight", "loss", "train")
"""Keys of a turn that give its loss weight; only the first may be a number other than 0 and 1."""


@dataclass
class TurnReader:
    """Reads the turns of one record.

    images, videos: where their paths are looked up. key: the record's key of the turns. name: of the record, for
    messages. unused: receives the keys that are not read. The methods raise BadSample.
    """

    images: ImageFolder
    videos: VideoFolder
    key: str
    name: str
    unused: list[str]

    def read(self, messages: object, media: str, images_first: bool) -> list[Said]:
        """Read a list of turns, or its JSON text. media: marks for pairs, and with `images_first` for all turns."""
        messages = filled_list(_rows(parsed(messages, self.key, self.name)), self.key, self.name)
        if isinstance(messages[0], dict) and {"user", "assistant"} <= messages[0].keys():
            said, images_first = [turn for pair in messages for turn in self._pair(pair)], True
        else:
            said = [self._turn(message) for message in messages]
        return media_first(said, media) if images_first else said

    def _pair(self, pair: object) -> tuple[Said, Said]:
        if not isinstance(pair, dict):
            raise BadSample(f"{self.name}: expected an object with 'user' and 'assistant', got {shown(pair)}")
        for role, what in (("user", "question"), ("assistant", "answer")):
            if not isinstance(pair.get(role), str):
                raise BadSample(f"{self.name}: the {what} must be a string, got {shown(pair.get(role))}")
        self._note_unused(pair, ("user", "assistant"), self.key)
        return user_said(pair["user"]), Said(Turn("assistant", pair["assistant"]))

    def _turn(self, message: object) -> Said:
        is_chat = isinstance(message, dict) and "role" in message and "from" not in message
        speaker, words = ("role", "content") if is_chat else ("from", "value")
        if not isinstance(message, dict) or message.get(words) is None:
            raise BadSample(
                f"{self.name}: a turn must be an object with 'from' and a string 'value', or 'role' and 'content', got "
                f"{shown(message)}"
            )
        role, content = _role_of(message.get(speaker), speaker, self.name), message[words]
        if is_chat and not isinstance(content, str):
            text, marks = self._items(content)
        elif isinstance(content, str):
            text, marks = content, marks_of(content)
        else:
            raise BadSample(f"{self.name}: 'value' must be a string, got {shown(content)}")
        if role != "assistant" and any(message.get(weight) for weight in WEIGHTS):
            raise BadSample(
                f"{self.name}: only the assistant's turns are trained, but a turn of the {role} has a weight"
            )
        if role == "assistant" and not isinstance(content, str) and marks:
            raise BadSample(f"{self.name}: only the user's turns can have images, but a turn of the assistant has one")
        self._note_unused(message, (speaker, words, *WEIGHTS, *GRADING), self.key)
        if role == "assistant":
            return Said(Turn(role, text, read_grading(message), _weight(message, self.name)))
        return Said(Turn(role, text), marks if role == "user" else ())

    def _items(self, content: object) -> tuple[str, tuple[Mark, ...]]:
        """Text of typed items, with a mark for each medium, and the media of the marks."""
        texts, marks = [], []
        for item in filled_list(content, "content", self.name):
            item = {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text" and isinstance(item.get("text"), str):
                texts.append(item["text"])
                marks += marks_of(item["text"])
            elif kind in ("image", "image_url"):
                texts.append(IMAGE_MARK)
                marks.append(item_image(self.images, item, self.name))
            elif kind == "video":
                texts.append(IMAGE_MARK)
                marks.append(item_video(self.videos, item, self.name))
            else:
                raise BadSample(
                    f"{self.name}: an item of 'content' must be of type text, image or video, got {shown(item)}"
                )
            known = ("type", "text", "index", *(MEDIA[1:] if kind == "video" else ITEM_IMAGES))
            self._note_unused(item, known, f"{self.key}[].content")
        return "".join(texts), tuple(marks)

    def _note_unused(self, item: Mapping, known: Iterable[str], where: str) -> None:
        """Add the unknown keys of a turn or an item to `unused`, unless one of them would change training."""
        for key, value in item.items():
            if key not in known and value is not None:
                refuse_if_needed(key, value, True, self.name)
                self.unused.append(f"{where}[].{key}")


def parsed(value: object, key: str, name: str) -> object:
    """A list of turns, also from its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{name}: '{key}' is a string, but not JSON: {first_line(error)}") from None


def filled_list(value: object, key: str, name: str) -> list:
    """Return `value` if it is a non-empty list, else raise BadSample."""
    if not isinstance(value, list) or not value:
        raise BadSample(f"{name}: '{key}' must be a non-empty list, got {shown(value)}")
    return value


def _rows(messages: object) -> object:
    """Messages as a list of objects, also if they are stored as an object of lists."""
    if isinstance(messages, dict) and messages and all(isinstance(column, list) for column in messages.values()):
        return [dict(zip(messages, row)) for row in zip(*messages.values())]
    return messages


def _role_of(value: object, key: str, name: str) -> str:
    """Map a speaker's name to ``system``, ``user`` or ``assistant``. Raises BadSample."""
    role = SPEAKERS.get(value) if isinstance(value, str) else None
    if role is None:
        raise BadSample(f"{name}: '{key}' must be one of {', '.join(SPEAKERS)}, got {shown(value)}")
    return role


def _weight(message: Mapping, name: str) -> float:
    """The loss weight of an assistant's turn. Raises BadSample."""
    given = [key for key in WEIGHTS if message.get(key) is not None]
    if not given:
        return 1.0
    value = message[given[0]]
    is_number = is_finite_number(float(value) if isinstance(value, bool) else value) and value >= 0
    if len(given) > 1 or not is_number or (given[0] != "weight" and value not in (0, 1)):
        said = {key: message[key] for key in given}
        raise BadSample(
            f"{name}: a turn must have one 'weight' of at least 0, or 'loss' or 'train' of 0 or 1, got {said}"
        )
    return float(value)


def exchange(values: Mapping, choices: object, name: str) -> list:
    """A question and its answer as messages. Both may be lists of messages (TRL's prompt and completion).

    choices: if this is a list, an answer that is a number is its position there (ScienceQA).
    """
    question, answer = values["question"], values["answer"]
    if isinstance(question, list):
        return question + (answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])
    if isinstance(choices, list) and choices and type(answer) is int:
        if not 0 <= answer < len(choices):
            raise BadSample(f"{name}: the answer {answer} is not the position of one of the {len(choices)} choices")
        answer = choices[answer]
    return [{"user": question, "assistant": _answer_text(answer, name)}]


def _answer_text(value: object, name: str) -> str:
    """The text of an answer: a string, a number, or the most frequent of several answers (the first among equals).

    Raises BadSample.
    """
    values = value if isinstance(value, list) and value else [value]
    values = [item.get("answer") if isinstance(item, dict) else item for item in values]
    for item in values:
        if not is_finite_number(item) and not isinstance(item, str):
            raise BadSample(f"{name}: the answer must be a string, got {shown(value)}")
    return str(Counter(values).most_common(1)[0][0])


def captioned(caption: object, media: str, name: str) -> list[Said]:
    """A caption, or a list of one, as the answer to the marks of `media`. Raises BadSample."""
    if isinstance(caption, list) and len(caption) == 1:
        (caption,) = caption
    if not isinstance(caption, str):
        several = "; data=hf trains on each of several captions" * isinstance(caption, list)
        raise BadSample(f"{name}: the caption must be a string, got {shown(caption)}{several}")
    if not media:
        raise BadSample(f"{name}: the record has a caption but no image")
    return [user_said(media), Said(Turn("assistant", caption))]


def system_said(words: object, said: Sequence[Said], name: str) -> Said:
    """The system's turn that comes before those of `said`. Raises BadSample."""
    if not isinstance(words, str):
        raise BadSample(f"{name}: 'system' must be a string, got {shown(words)}")
    if said and said[0].turn.role == "system":
        raise BadSample(f"{name}: the record has a 'system' and a system turn")
    return Said(Turn("system", words))


def alternating(said: Sequence[Said]) -> list[Said]:
    """Turns that alternate between user and assistant, starting with the user and ending with the assistant."""
    out = [each for each in said[:1] if each.turn.role == "system"]
    start = len(out)
    for each in said[start:]:
        last = out[-1].turn if len(out) > start else None
        if last and (last.role, last.weight) == (each.turn.role, each.turn.weight):
            text = f"{last.text}\n{each.turn.text}"
            lists = (mine + further for mine, further in zip(out[-1][1:], each[1:]))
            out[-1] = Said(replace(each.turn, text=text), *lists)
        elif last or each.turn.role == "user":
            out.append(each)
    while len(out) > start and out[-1].turn.role == "user":
        out.pop()
    return out
