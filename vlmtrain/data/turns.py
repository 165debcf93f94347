"""Shared code of the data formats: names of roles and records, and turns made from the text of a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import printable, shown
from .records import IMAGE_MARK, UNGRADED, BadSample, Grading, Turn

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

GRADING = ("category", "answers", "captions", "choices")
"""Keys of a record, or of its assistant turn, that evaluation uses."""
FEWEST_ANSWERS = 4  # VQA compares with all but one annotator and needs three to agree for full accuracy


def record_name(where: str, id: object) -> str:
    """Name of a record in messages: its file and number, and its id if it has one."""
    if id is None:
        return where
    return f"{where} (id {printable(id, 200) if isinstance(id, str) else shown(id)})"


def role_of(value: object, key: str, name: str) -> str:
    """Map a speaker's name to ``system``, ``user`` or ``assistant``. Raises BadSample."""
    role = ROLES.get(value) if isinstance(value, str) else None
    if role is None:
        raise BadSample(f"{name}: '{key}' must be one of {', '.join(ROLES)}, got {shown(value)}")
    return role


def filled_list(value: object, key: str, name: str) -> list:
    """Return `value` if it is a non-empty list, else raise BadSample."""
    if not isinstance(value, list) or not value:
        raise BadSample(f"{name}: '{key}' must be a non-empty list, got {shown(value)}")
    return value


def llava_turns(conversations: object, key: str, name: str) -> tuple[Turn, ...]:
    """Convert ``[{"from", "value"}]`` to turns. Raises BadSample, naming the record."""
    return tuple(_llava_turn(turn, name) for turn in filled_list(conversations, key, name))


def _llava_turn(turn: object, name: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise BadSample(f"{name}: a turn must be an object with 'from' and a string 'value', got {shown(turn)}")
    role = role_of(turn.get("from"), "from", name)
    return Turn(role, turn["value"], read_grading(turn, name) if role == "assistant" else UNGRADED)


def answer_turns(question: object, answer: object, name: str) -> tuple[Turn, Turn]:
    """Turns of one question and its answer. Raises BadSample unless both are strings."""
    for key, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str):
            raise BadSample(f"{name}: the {key} must be a string, got {shown(value)}")
    return Turn("user", question), Turn("assistant", answer)


def caption_turns(caption: object, pictures: int, name: str) -> tuple[Turn, Turn]:
    """Turns of images and their caption. Raises BadSample if the caption or the image is missing."""
    if not isinstance(caption, str):
        raise BadSample(f"{name}: the caption must be a string, got {shown(caption)}")
    if pictures == 0:
        raise BadSample(f"{name}: the record has a caption but no image")
    return Turn("user", "\n".join([IMAGE_MARK] * pictures)), Turn("assistant", caption)


def pictures_in_front(turns: tuple[Turn, ...], pictures: int) -> tuple[Turn, ...]:
    """Turns with one mark per image, each on its own line, in front of the user's text, unless it has marks."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or any(IMAGE_MARK in turn.text for turn in turns if turn.role == "user"):
        return turns
    marked = Turn("user", "\n".join([IMAGE_MARK] * pictures + [turns[first].text]))
    return (*turns[:first], marked, *turns[first + 1 :])


def read_grading(record: Mapping, name: str) -> Grading:
    """Annotations of a record or a turn for evaluation. Raises BadSample, naming the record."""
    found = {key: record[key] for key in GRADING if record.get(key) is not None}
    if not found:
        return UNGRADED
    category = found.pop("category", None)
    if category is not None and (isinstance(category, bool) or not isinstance(category, str | int)):
        raise BadSample(f"{name}: 'category' must be a string, got {shown(category)}")
    lists = {key: tuple(_text_of(value, key, name) for value in filled_list(found[key], key, name)) for key in found}
    if 0 < len(lists.get("answers", ())) < FEWEST_ANSWERS:
        said = shown(found["answers"])
        raise BadSample(f"{name}: 'answers' must be of at least {FEWEST_ANSWERS} annotators (VQA has ten), got {said}")
    return Grading(None if category is None else str(category), **lists)


def _text_of(value: object, key: str, name: str) -> str:
    """Return a string, also from the form of VQA's annotations, ``{"answer": "red", ...}``."""
    text = value.get("answer") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise BadSample(f"{name}: '{key}' must be a list of strings, got {shown(value)}")
    return text


def graded(turns: tuple[Turn, ...], record: Mapping, name: str) -> tuple[Turn, ...]:
    """Add the annotations of a record to its turns.

    Raises BadSample if it is unclear to which turn they belong, or if an answer is not one of its choices.
    """
    grading = read_grading(record, name)
    if grading != UNGRADED:
        spoken = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if replace(grading, category=None) != UNGRADED and len(spoken) > 1:
            raise BadSample(
                f"{name}: the record has {len(spoken)} answers: put answers, captions and choices into its turns"
            )
        turns = tuple(
            replace(turn, grading=_together(turn.grading, grading)) if turn.role == "assistant" else turn
            for turn in turns
        )
    for turn in turns:
        choices = [choice.strip() for choice in turn.grading.choices]
        if choices and turn.text.strip() not in choices:
            raise BadSample(f"{name}: the answer {shown(turn.text)} is not one of its 'choices', {shown(choices)}")
    return turns


def _together(own: Grading, whole: Grading) -> Grading:
    """Annotations of the turn, completed by those of its record."""
    return Grading(*(mine or theirs for mine, theirs in zip(vars(own).values(), vars(whole).values())))
