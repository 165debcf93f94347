"""Reads records of all data formats: mappings with the keys that public data sets use.

A record has its text in one of four forms:

    turns      conversations | messages | texts         a list of turns, or such a list as a JSON string
    dialogues  dialogues                                lists of turns, each about all images of the record
    exchange   question | query | prompt                and  answer | label | answers | completion | response
    caption    caption | text | captions

A turn is ``{"from", "value"}`` (LLaVA), ``{"role", "content"}`` with a string or typed items (OpenAI, ms-swift, TRL),
or ``{"user", "assistant"}``. A key that would change training is read or refused; all others are listed in
`Conversation.unused`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ..errors import first_line, is_finite_number, printable, shown
from .grading import GRADING, graded, read_grading
from .images import ImageFolder, is_image_value
from .records import (
    IMAGE_MARK,
    VIDEO_MARK,
    BadSample,
    Conversation,
    ImageSource,
    Turn,
    VideoSource,
    is_video,
    region_marks,
)
from .regions import BOX_MARK, POINT_MARK, Region
from .video import VideoFolder

KEYS = {
    "messages": ("conversations", "messages", "texts"),
    "dialogues": ("dialogues",),
    "question": ("question", "query", "prompt"),
    "answer": ("answer", "label", "answers", "completion", "response"),
    "caption": ("caption", "text", "captions"),
    "image": ("image", "images"),
    "video": ("video", "videos"),
    "video_start": ("video_start",),
    "video_end": ("video_end",),
    "system": ("system",),
    "id": ("id",),
}
"""Keys of a record by role; the first one that is present is read."""
FORMS = (("messages",), ("dialogues",), ("question", "answer"), ("caption",))
"""Roles that together provide a record's text."""
REGIONS = {BOX_MARK: ("boxes", "box_images", 4), POINT_MARK: ("points", "point_images", 2)}
"""For each mark of regions: the keys of their coordinates and of their images, and the number of coordinates."""
SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"},
    "system": "system",
}
WEIGHTS = ("weight", "loss", "train")
"""Keys of a turn that give its loss weight; only the first may be a number other than 0 and 1."""
REFUSED = re.compile(
    r"(.*_)?(videos?|audios?|tools|tool_calls|functions?|function_call|reasoning|reasoning_content|thinking|chosen|"
    r"rejected|rejected_response|history|objects|images?|img|picture|instruction|system_prompt|context)"
)
"""Keys whose content would change training if it was read."""
REFUSED_WEIGHT = re.compile(
    r"(.*_)?(loss|loss_scale|loss_mask|loss_weight|sample_weight|weight|train|trainable|train_on_turn)"
)
"""Keys of the weight of a sample or a turn, which would change training whatever their value is."""


Medium = ImageSource | VideoSource


class _Said(NamedTuple):
    """A turn, the media of its marks, and its regions with the positions of their images among the record's images.

    A mark is a medium, the position of an image among the record's images, or the mark itself for the next medium.
    """

    turn: Turn
    marks: tuple[Medium | int | str, ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass
class RecordReader:
    """Converts records to conversations.

    images, videos: where their paths are looked up. keys: the key of each role (of `KEYS` and `GRADING`); None: the
    usual names. ignored: keys that are not read. images_first: put images before the user's first text if it has no
    marks, as the forms without turns always do. repair: make turns alternate by dropping a first assistant turn and a
    last user turn, and by joining consecutive turns of one speaker.
    """

    images: ImageFolder
    videos: VideoFolder = field(default_factory=VideoFolder)
    keys: Mapping[str, str] | None = None
    ignored: Sequence[str] = ()
    images_first: bool = False
    repair: bool = False

    def has_turns(self, record: Mapping) -> bool:
        """Whether a record has its text in turns, or in a question."""
        roles = self._roles({key: value for key, value in record.items() if value is not None})
        return bool(roles.keys() & {"messages", "dialogues", "question"})

    def read(
        self,
        record: object,
        where: str,
        id: object = None,
        images: Sequence[ImageSource] | None = None,
        videos: Sequence[VideoSource] = (),
    ) -> Conversation:
        """Convert a record. Raises BadSample, naming the record.

        images, videos: instead of those that the record names; without `videos`, those of the record are read.
        """
        if not isinstance(record, Mapping):
            raise BadSample(f"{where}: expected an object, got {type(record).__name__}")
        record = {key: value for key, value in record.items() if value is not None and key not in self.ignored}
        found = self._roles(record)
        values = {role: record[key] for role, key in found.items()}
        name = record_name(where, values.get("id") if id is None else id)
        form = next((form for form in FORMS if all(role in values for role in form)), None)
        if form is None:
            got = ", ".join(f"'{printable(str(key), 40)}'" for key in list(record)[:12]) or "no keys"
            raise BadSample(f"{name}: expected {self._expected()}; got {got}")
        if "dialogues" in values:
            return self._several(record, found, where, name, id, images, videos)
        if images is None:
            images = self._images(values.get("image"), found.get("image"), name)
        videos = self._videos({**values, "video": list(videos)} if videos else values, found.get("video"), name)
        text = {role: values.get(role) for role in ("question", "answer")}
        left = [found[role] for role, value in text.items() if isinstance(value, str | list) and value]
        if form == ("caption",) and left:
            raise BadSample(
                f"{name}: with '{found['caption']}' and '{left[0]}' it is neither a caption nor a question and its "
                f"answer; rename the keys, or ignore one with data.ignore=[{left[0]}]"
            )
        used = {found[role] for role in (*form, *_MEDIA, "system", "id", *GRADING) if role in found}
        used |= {key for *keys, _ in REGIONS.values() for key in keys}
        unused = [key for key in record if key not in used]
        for key in unused:
            _refuse_if_needed(key, record[key], bool(images or videos), name)
        choices = values.get("choices", record.get("choices"))
        marks = "\n".join([IMAGE_MARK] * len(images) + [VIDEO_MARK] * len(videos))
        said = self._said(form, values, choices, found[form[0]], marks, unused, name)
        if "system" in values:
            said = [_system(values["system"], said, name), *said]
        said, unmarked = _with_media(_with_regions(said, record, name), images, videos, name)
        kept = _alternating(said) if self.repair else said
        turns = graded(tuple(each.turn for each in kept), {role: values[role] for role in GRADING if role in values})
        media = tuple(medium for each in kept for medium in each.marks) + unmarked
        shown_images = images or [medium for medium in media if not is_video(medium)]
        regions = _located((region for each in kept for region in each.regions), shown_images, media, name)
        return Conversation(name, turns, media, tuple(dict.fromkeys(unused)), kept != said, regions=regions)

    def _several(
        self,
        record: Mapping,
        found: Mapping[str, str],
        where: str,
        name: str,
        id: object,
        images: Sequence[ImageSource] | None,
        videos: Sequence[VideoSource] | None,
    ) -> Conversation:
        """Read each of the dialogues of a record as if its turns were the record's. found: the key of each role."""
        key = found["dialogues"]
        others = [other for role, other in found.items() if role in ("messages", "question", "caption")]
        if others:
            raise BadSample(
                f"{name}: '{key}' replaces '{others[0]}', but the record has both; ignore one of them with data.ignore"
            )
        if regions := [each for *keys, _ in REGIONS.values() for each in keys if each in record]:
            ignored = ",".join(regions)
            raise BadSample(
                f"{name}: '{key}' does not support '{regions[0]}'; data.ignore=[{ignored}] trains without it"
            )
        reader = replace(self, keys={**{role: own for role, own in found.items() if own != key}, "messages": key})
        told = filled_list(_parsed(record[key], key, name), key, name)
        first, *rest = (
            reader.read({**record, key: one}, f"{where} dialogue {number}", id, images, videos)
            for number, one in enumerate(told, 1)
        )
        for number, each in enumerate(rest, 2):
            if each.media != first.media:
                raise BadSample(f"{name}: dialogue {number} does not show the images of dialogue 1 in the same order")
        others = tuple(each.turns for each in rest)
        unused = dict.fromkeys(unused for each in (first, *rest) for unused in each.unused)
        repaired = any(each.repaired for each in (first, *rest))
        return Conversation(name, first.turns, first.media, tuple(unused), repaired, others)

    def _roles(self, record: Mapping) -> dict[str, str]:
        """The record's key of each role that it has."""
        if self.keys is not None:
            return {role: key for role, key in self.keys.items() if key in record}
        usual = {role: next((key for key in keys if key in record), None) for role, keys in KEYS.items()}
        return {role: key for role, key in usual.items() if key} | {key: key for key in GRADING if key in record}

    def _expected(self) -> str:
        """The keys of a record's text, for messages."""
        names = {role: keys[0] for role, keys in KEYS.items()} if self.keys is None else self.keys
        forms = [" and ".join(f"'{names[role]}'" for role in form) for form in FORMS if set(form) <= names.keys()]
        return ", or ".join(forms)

    def _images(self, value: object, key: str | None, name: str) -> tuple[ImageSource, ...]:
        if value is None or value == "":
            return ()
        values = value if isinstance(value, list) else [value]
        return tuple(self.images.read(one, f"{i} of '{key}'", name) for i, one in enumerate(values))

    def _said(
        self,
        form: tuple[str, ...],
        values: Mapping,
        choices: object,
        key: str,
        media: str,
        unused: list[str],
        name: str,
    ) -> list[_Said]:
        if form == ("caption",):
            caption, captions = values["caption"], values["caption"]
            if isinstance(captions, list) and len(captions) == 1:
                (caption,) = captions
            if not isinstance(caption, str):
                several = "; data=hf trains on each of several captions" * isinstance(caption, list)
                raise BadSample(f"{name}: the caption must be a string, got {shown(caption)}{several}")
            if not media:
                raise BadSample(f"{name}: the record has a caption but no image")
            return [_user(media), _Said(Turn("assistant", caption))]
        messages = values["messages"] if form == ("messages",) else _exchange(values, choices, name)
        return self._messages(messages, key, media, unused, name)

    def _messages(self, value: object, key: str, media: str, unused: list[str], name: str) -> list[_Said]:
        messages = filled_list(_rows(_parsed(value, key, name)), key, name)
        if isinstance(messages[0], dict) and {"user", "assistant"} <= messages[0].keys():
            said = [turn for pair in messages for turn in self._pair(pair, key, unused, name)]
            return _media_first(said, media)
        said = [self._turn(message, key, unused, name) for message in messages]
        return _media_first(said, media) if self.images_first else said

    def _pair(self, pair: object, key: str, unused: list[str], name: str) -> tuple[_Said, _Said]:
        if not isinstance(pair, dict):
            raise BadSample(f"{name}: expected an object with 'user' and 'assistant', got {shown(pair)}")
        for role, what in (("user", "question"), ("assistant", "answer")):
            if not isinstance(pair.get(role), str):
                raise BadSample(f"{name}: the {what} must be a string, got {shown(pair.get(role))}")
        _note_unused(pair, ("user", "assistant"), key, unused, name)
        return _user(pair["user"]), _Said(Turn("assistant", pair["assistant"]))

    def _turn(self, message: object, key: str, unused: list[str], name: str) -> _Said:
        is_chat = isinstance(message, dict) and "role" in message and "from" not in message
        speaker, words = ("role", "content") if is_chat else ("from", "value")
        if not isinstance(message, dict) or message.get(words) is None:
            raise BadSample(
                f"{name}: a turn must be an object with 'from' and a string 'value', or 'role' and 'content', got "
                f"{shown(message)}"
            )
        role, content = role_of(message.get(speaker), speaker, name), message[words]
        if is_chat and not isinstance(content, str):
            text, marks = self._items(content, key, unused, name)
        elif isinstance(content, str):
            text, marks = content, _marks(content)
        else:
            raise BadSample(f"{name}: 'value' must be a string, got {shown(content)}")
        if role != "assistant":
            if any(message.get(weight) for weight in WEIGHTS):
                raise BadSample(
                    f"{name}: only the assistant's turns are trained, but a turn of the {role} has a weight"
                )
            _note_unused(message, (speaker, words, *WEIGHTS, *GRADING), key, unused, name)
            return _Said(Turn(role, text), marks if role == "user" else ())
        if not isinstance(content, str) and marks:
            raise BadSample(f"{name}: only the user's turns can have images, but a turn of the assistant has one")
        _note_unused(message, (speaker, words, *WEIGHTS, *GRADING), key, unused, name)
        return _Said(Turn(role, text, read_grading(message), _weight(message, name)))

    def _items(self, content: object, key: str, unused: list[str], name: str) -> tuple[str, tuple]:
        """Text of typed items, with a mark for each medium, and the media of the marks."""
        texts, marks = [], []
        for item in filled_list(content, "content", name):
            item = {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text" and isinstance(item.get("text"), str):
                texts.append(item["text"])
                marks += _marks(item["text"])
            elif kind in ("image", "image_url"):
                texts.append(IMAGE_MARK)
                marks.append(self._item_image(item, name))
            elif kind == "video":
                texts.append(IMAGE_MARK)
                marks.append(self._item_video(item, name))
            else:
                raise BadSample(f"{name}: an item of 'content' must be of type text, image or video, got {shown(item)}")
            known = ("type", "text", "index", *(_MEDIA[1:] if kind == "video" else _ITEM_IMAGES))
            _note_unused(item, known, f"{key}[].content", unused, name)
        return "".join(texts), tuple(marks)

    def _item_image(self, item: Mapping, name: str) -> ImageSource | int | str:
        named = [key for key in _ITEM_IMAGES if key in item]
        if "index" in item:
            if named or not isinstance(item["index"], int) or isinstance(item["index"], bool):
                raise BadSample(f"{name}: an image item must have an 'index' or an image, got {shown(item)}")
            return item["index"]
        if len(named) > 1:
            raise BadSample(f"{name}: an image item must have one image, got {' and '.join(named)}")
        return self.images.read(item[named[0]], "of 'content'", name) if named else IMAGE_MARK

    def _item_video(self, item: Mapping, name: str) -> VideoSource | str:
        if "video" not in item:
            return VIDEO_MARK
        times = item.get("video_start"), item.get("video_end")
        return self.videos.read(item["video"], "of 'content'", name, *times)

    def _videos(self, values: Mapping, key: str | None, name: str) -> tuple[VideoSource, ...]:
        """The videos of a record, each with its start and end in seconds."""
        value, starts, ends = (values.get(role) for role in _MEDIA[1:])
        if value is None or value == "" or value == []:
            if starts is not None or ends is not None:
                raise BadSample(f"{name}: the record has the start or end of a video, but no video")
            return ()
        is_frames = isinstance(value, list) and all(isinstance(one, str) and is_image_value(one) for one in value)
        values = value if isinstance(value, list) and not is_frames else [value]
        columns = []
        for role, times in (("video_start", starts), ("video_end", ends)):
            times = times if isinstance(times, list) else [times] * len(values)
            if len(times) != len(values):
                raise BadSample(f"{name}: '{role}' has {len(times)} times for {len(values)} videos")
            columns.append(times)
        each = enumerate(zip(values, *columns))
        return tuple(self.videos.read(one, f"{i} of '{key}'", name, start, end) for i, (one, start, end) in each)


def read_record(record: Mapping, images: str | Path = ".", videos: str | Path = ".") -> Conversation:
    """Convert one record, in any of the formats that data sets may have, to a conversation.

    images, videos: the folders of relative paths. Raises BadSample for a record that cannot be read, and ValueError if
    a folder does not exist. Media are opened when the conversation is loaded.
    """
    reader = RecordReader(ImageFolder(images, outside=True), VideoFolder(videos, outside=True))
    return reader.read(record, "the record")


_MEDIA = ("image", "video", "video_start", "video_end")
_ITEM_IMAGES = ("image", "image_url", "url", "path", "base64", "data")


def _user(text: str) -> _Said:
    return _Said(Turn("user", text), _marks(text))


def _marks(text: str) -> tuple[str, ...]:
    return tuple(re.findall(f"{IMAGE_MARK}|{VIDEO_MARK}", text))


def record_name(where: str, id: object) -> str:
    """Name of a record in messages: its file and number, and its id if it has one."""
    if id is None:
        return where
    return f"{where} (id {printable(id, 200) if isinstance(id, str) else shown(id)})"


def role_of(value: object, key: str, name: str) -> str:
    """Map a speaker's name to ``system``, ``user`` or ``assistant``. Raises BadSample."""
    role = SPEAKERS.get(value) if isinstance(value, str) else None
    if role is None:
        raise BadSample(f"{name}: '{key}' must be one of {', '.join(SPEAKERS)}, got {shown(value)}")
    return role


def filled_list(value: object, key: str, name: str) -> list:
    """Return `value` if it is a non-empty list, else raise BadSample."""
    if not isinstance(value, list) or not value:
        raise BadSample(f"{name}: '{key}' must be a non-empty list, got {shown(value)}")
    return value


def _exchange(values: Mapping, choices: object, name: str) -> list:
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
    return [{"user": question, "assistant": answer_text(answer, name)}]


def answer_text(value: object, name: str) -> str:
    """The text of an answer: a string, a number, or the most frequent of several answers (the first among equals).

    Raises BadSample.
    """
    values = value if isinstance(value, list) and value else [value]
    values = [item.get("answer") if isinstance(item, dict) else item for item in values]
    for item in values:
        if not is_finite_number(item) and not isinstance(item, str):
            raise BadSample(f"{name}: the answer must be a string, got {shown(value)}")
    return str(Counter(values).most_common(1)[0][0])


def _parsed(value: object, key: str, name: str) -> object:
    """A list of turns, also from its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{name}: '{key}' is a string, but not JSON: {first_line(error)}") from None


def _rows(messages: object) -> object:
    """Messages as a list of objects, also if they are stored as an object of lists."""
    if isinstance(messages, dict) and messages and all(isinstance(column, list) for column in messages.values()):
        return [dict(zip(messages, row)) for row in zip(*messages.values())]
    return messages


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


def _system(words: object, said: Sequence[_Said], name: str) -> _Said:
    if not isinstance(words, str):
        raise BadSample(f"{name}: 'system' must be a string, got {shown(words)}")
    if said and said[0].turn.role == "system":
        raise BadSample(f"{name}: the record has a 'system' and a system turn")
    return _Said(Turn("system", words))


def _note_unused(item: Mapping, known: Iterable[str], where: str, unused: list[str], name: str) -> None:
    """Add the unknown keys of a turn or an item to `unused`. Raises BadSample for one that would change training."""
    for key, value in item.items():
        if key not in known and value is not None:
            _refuse_if_needed(key, value, True, name)
            unused.append(f"{where}[].{key}")


def _refuse_if_needed(key: object, value: object, has_images: bool, name: str) -> None:
    """Raise BadSample for the content of an unused key that would change training if it was read.

    Further paths of images are allowed if the record has images: they are often the origin of these.
    """
    if isinstance(key, str) and REFUSED_WEIGHT.fullmatch(key):
        raise BadSample(f"{name}: '{key}' is not supported; data.ignore=[{key}] trains without it")
    if not value or not isinstance(key, str):
        return
    is_image = is_image_value(value)
    if is_image and isinstance(value, str) and has_images and REFUSED.fullmatch(key) is None:
        return
    if is_image:
        raise BadSample(
            f"{name}: '{key}' contains an image that nothing reads: set data.columns.image={key} (data=hf), rename it "
            f"to 'image', or ignore it with data.ignore=[{key}]"
        )
    if REFUSED.fullmatch(key):
        raise BadSample(f"{name}: '{key}' is not supported; data.ignore=[{key}] trains without it")


def _media_first(said: Sequence[_Said], media: str) -> list[_Said]:
    """Turns with the marks of all `media` before the user's first text, unless there are marks."""
    first = next((i for i, each in enumerate(said) if each.turn.role == "user"), None)
    has_videos = VIDEO_MARK in media
    if first is None or any(mark != VIDEO_MARK or has_videos for each in said for mark in each.marks):
        return list(said)
    marked = _user("\n".join(filter(None, [media, said[first].turn.text])))
    return [*said[:first], marked, *said[first + 1 :]]


def _with_regions(said: Sequence[_Said], record: Mapping, name: str) -> list[_Said]:
    """Turns with the regions of their marks. Raises BadSample unless the record has one for each mark.

    In a record without regions, marks are ordinary text.
    """
    if not any(key in record for *keys, _ in REGIONS.values() for key in keys):
        return list(said)
    waiting = {mark: iter(_regions(record, mark, said, name)) for mark in REGIONS}
    return [each._replace(regions=tuple(next(waiting[mark]) for mark in region_marks(each.turn))) for each in said]


def _regions(record: Mapping, mark: str, said: Sequence[_Said], name: str) -> list[Region]:
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
        ignored = ",".join(each for *keys, _ in REGIONS.values() for each in keys if each in record)
        raise BadSample(
            f"{name}: {marks} {mark} marks in the text, but {len(given)} {key}; data.ignore=[{ignored}] trains on the "
            "text as it is"
        )
    return [Region(tuple(map(float, at)), medium) for at, medium in zip(given, media)]


def _located(
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


def _with_media(
    said: Sequence[_Said], images: Sequence[ImageSource], videos: Sequence[VideoSource], name: str
) -> tuple[list[_Said], tuple[Medium, ...]]:
    """Turns with the media of their marks, and the media without a mark. Raises BadSample for a wrong index.

    Without images, the marks of images are those of videos, as in LLaVA-Video-178K. Without videos, the marks of videos
    are ordinary text.
    """
    flat = [mark for each in said for mark in each.marks]
    indices = [mark for mark in flat if isinstance(mark, int)]
    if indices and IMAGE_MARK in flat:
        raise BadSample(f"{name}: some image items have an 'index' and others have none")
    if not all(0 <= index < len(images) for index in indices):
        raise BadSample(f"{name}: the image items have the indices {indices}, but there are {len(images)} images")
    rest = {IMAGE_MARK: list(images), VIDEO_MARK: list(videos)}
    if not images:
        rest[IMAGE_MARK] = rest[VIDEO_MARK]

    def medium_of(mark: Medium | int | str) -> Medium | None:
        if isinstance(mark, int):
            return images[mark]
        if not isinstance(mark, str):
            return mark
        return rest[mark].pop(0) if rest[mark] else None

    found = [each._replace(marks=tuple(filter(None, map(medium_of, each.marks)))) for each in said]
    unmarked = [] if indices else [*rest[IMAGE_MARK]] if images else []
    return found, (*unmarked, *rest[VIDEO_MARK])


def _alternating(said: Sequence[_Said]) -> list[_Said]:
    """Turns that alternate between user and assistant, starting with the user and ending with the assistant."""
    out = [each for each in said[:1] if each.turn.role == "system"]
    start = len(out)
    for each in said[start:]:
        last = out[-1].turn if len(out) > start else None
        if last and (last.role, last.weight) == (each.turn.role, each.turn.weight):
            text = f"{last.text}\n{each.turn.text}"
            out[-1] = _Said(replace(each.turn, text=text), out[-1].marks + each.marks, out[-1].regions + each.regions)
        elif last or each.turn.role == "user":
            out.append(each)
    while len(out) > start and out[-1].turn.role == "user":
        out.pop()
    return out
