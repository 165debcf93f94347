"""Reads records of all data formats: mappings with the keys that public data sets use.

A record has its text in one of four forms:

    turns      conversations | messages | texts         a list of turns, or such a list as a JSON string
    dialogues  dialogues                                lists of turns, each about all images of the record
    exchange   question | query | prompt                and  answer | label | answers | completion | response | actions
    caption    caption | text | captions

A turn is ``{"from", "value"}`` (LLaVA), ``{"role", "content"}`` with a string or typed items (OpenAI, ms-swift, TRL),
or ``{"user", "assistant"}``. A key that would change training is read or refused; all others are listed in
`Conversation.unused`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import printable, shown
from .actions import ACTION_MARK
from .grading import GRADING, graded
from .images import ImageFolder
from .record_actions import read_actions, with_actions
from .record_keys import FORMS, KEYS, refuse_if_needed
from .record_media import MEDIA, read_images, read_videos, with_media
from .record_regions import located, region_keys, with_regions
from .record_turns import TurnReader, alternating, captioned, exchange, filled_list, parsed, system_said
from .records import IMAGE_MARK, VIDEO_MARK, BadSample, Conversation, ImageSource, VideoSource, is_video
from .video import VideoFolder


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
            return self._several(record, found, name, where, id, images, videos)
        if images is None:
            images = read_images(self.images, values.get("image"), found.get("image"), name)
        given = {**values, "video": list(videos)} if videos else values
        videos = read_videos(self.videos, given, found.get("video"), name)
        if "actions" in found:
            actions = read_actions(values["actions"], found["actions"], name)
            if found.get("answer") == found["actions"]:
                values["answer"] = ACTION_MARK * len(actions)
        text = [role for role in ("question", "answer") if isinstance(values.get(role), str | list) and values[role]]
        if form == ("caption",) and text:
            left = found[text[0]]
            raise BadSample(
                f"{name}: with '{found['caption']}' and '{left}' it is neither a caption nor a question and its "
                f"answer; rename the keys, or ignore one with data.ignore=[{left}]"
            )
        used = {found[role] for role in (*form, *MEDIA, "actions", "system", "id", *GRADING) if role in found}
        used.update(region_keys(record))
        unused = [key for key in record if key not in used]
        for key in unused:
            refuse_if_needed(key, record[key], bool(images or videos), name)
        marks = "\n".join([IMAGE_MARK] * len(images) + [VIDEO_MARK] * len(videos))
        if form == ("caption",):
            said = captioned(values["caption"], marks, name)
        else:
            choices = values.get("choices", record.get("choices"))
            messages = values["messages"] if form == ("messages",) else exchange(values, choices, name)
            reader = TurnReader(self.images, self.videos, found[form[0]], name, unused)
            said = reader.read(messages, marks, self.images_first)
        if "system" in values:
            said = [system_said(values["system"], said, name), *said]
        if "actions" in found:
            said = with_actions(said, actions, found["actions"], name)
        said, unmarked = with_media(with_regions(said, record, name), images, videos, name)
        kept = alternating(said) if self.repair else said
        turns = graded(tuple(each.turn for each in kept), {role: values[role] for role in GRADING if role in values})
        media = tuple(medium for each in kept for medium in each.marks) + unmarked
        shown_images = images or [medium for medium in media if not is_video(medium)]
        regions = located((region for each in kept for region in each.regions), shown_images, media, name)
        own = {"regions": regions, "actions": tuple(action for each in kept for action in each.actions)}
        return Conversation(name, turns, media, tuple(dict.fromkeys(unused)), kept != said, **own)

    def _several(self, record: Mapping, found: Mapping[str, str], name: str, where: str, *given) -> Conversation:
        """Read each of the dialogues of a record as if its turns were the record's.

        found: the key of each role. given: the other arguments of `read`.
        """
        key = found["dialogues"]
        others = [other for role, other in found.items() if role in ("messages", "question", "caption")]
        if others:
            raise BadSample(
                f"{name}: '{key}' replaces '{others[0]}', but the record has both; ignore one of them with data.ignore"
            )
        if own := [*region_keys(record), *(found[role] for role in ("actions",) if role in found)]:
            ignored = ",".join(own)
            raise BadSample(f"{name}: '{key}' does not support '{own[0]}'; data.ignore=[{ignored}] trains without it")
        reader = replace(self, keys={**{role: own for role, own in found.items() if own != key}, "messages": key})
        told = filled_list(parsed(record[key], key, name), key, name)
        first, *rest = (
            reader.read({**record, key: one}, f"{where} dialogue {number}", *given)
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
        """The record's key of each role that it has. Actions are also the answer to a question without another one."""
        if self.keys is not None:
            found = {role: key for role, key in self.keys.items() if key in record}
        else:
            usual = {role: next((key for key in keys if key in record), None) for role, keys in KEYS.items()}
            found = {role: key for role, key in usual.items() if key} | {key: key for key in GRADING if key in record}
        if {"question", "actions"} <= found.keys():
            found.setdefault("answer", found["actions"])
        return found

    def _expected(self) -> str:
        """The keys of a record's text, for messages."""
        names = {role: keys[0] for role, keys in KEYS.items()} if self.keys is None else self.keys
        forms = [" and ".join(f"'{names[role]}'" for role in form) for form in FORMS if set(form) <= names.keys()]
        return ", or ".join(forms)


def read_record(record: Mapping, images: str | Path = ".", videos: str | Path = ".") -> Conversation:
    """Convert one record, in any of the formats that data sets may have, to a conversation.

    images, videos: the folders of relative paths. Raises BadSample for a record that cannot be read, and ValueError if
    a folder does not exist. Media are opened when the conversation is loaded.
    """
    reader = RecordReader(ImageFolder(images, outside=True), VideoFolder(videos, outside=True))
    return reader.read(record, "the record")


def record_name(where: str, id: object) -> str:
    """Name of a record in messages: its file and number, and its id if it has one."""
    if id is None:
        return where
    return f"{where} (id {printable(id, 200) if isinstance(id, str) else shown(id)})"
