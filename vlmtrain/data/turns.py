"""What the data formats have in common: speakers' names, a record's name, and turns made of its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import printable, shown
from .records import IMAGE_MARK, UNGRADED, BadSample, Grading, Turn

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

GRADING = ("category", "answers", "captions", "choices")
"""Keys of a record, or of its assistant's turn, that evaluation reads."""
FEWEST_ANSWERS = 4  # with three, all but one of whom are left to compare with, nothing could be wholly right


def record_name(where: str, id: object) -> str:
    """What messages call a record: its file and number, and its id if it has one."""
    if id is None:
        return where
    return f"{where} (id {printable(id, 200) if isinstance(id, str) else shown(id)})"


def role_of(value: object, key: str, name: str) -> str:
    """``system``, ``user`` or ``assistant`` for a speaker's name. Raises BadSample."""
    role = ROLES.get(value) if isinstance(value, str) else None
    if role is None:
        raise BadSample(f"{name}: '{key}' must be one of {', '.join(ROLES)}, got {shown(value)}")
    return role


def filled_list(value: object, key: str, name: str) -> list:
    """`value`, if it is a list that is not empty. Raises BadSample."""
    if not isinstance(value, list) or not value:
        raise BadSample(f"{name}: '{key}' must be a list that is not empty, got {shown(value)}")
    return value


def llava_turns(conversations: object, key: str, name: str) -> tuple[Turn, ...]:
    """Turns of ``[{"from", "value"}]``. Raises BadSample, naming the record."""
    return tuple(_llava_turn(turn, name) for turn in filled_list(conversations, key, name))


def _llava_turn(turn: object, name: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise BadSample(f"{name}: a turn must be an object with 'from' and a 'value' text, got {shown(turn)}")
    role = role_of(turn.get("from"), "from", name)
    return Turn(role, turn["value"], read_grading(turn, name) if role == "assistant" else UNGRADED)


def answer_turns(question: object, answer: object, name: str) -> tuple[Turn, Turn]:
    """One question and its answer. Raises BadSample unless both are texts."""
    for key, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str):
            raise BadSample(f"{name}: the {key} must be a text, got {shown(value)}")
    return Turn("user", question), Turn("assistant", answer)


def caption_turns(caption: object, pictures: int, name: str) -> tuple[Turn, Turn]:
    """Pictures, then what is said of them. Raises BadSample without a text or a picture."""
    if not isinstance(caption, str):
        raise BadSample(f"{name}: the caption must be a text, got {shown(caption)}")
    if pictures == 0:
        raise BadSample(f"{name}: a caption without a picture")
    return Turn("user", "\n".join([IMAGE_MARK] * pictures)), Turn("assistant", caption)


def pictures_in_front(turns: tuple[Turn, ...], pictures: int) -> tuple[Turn, ...]:
    """Turns with a mark a picture, each on a line, before the first user turn, unless the user's words have marks."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or any(IMAGE_MARK in turn.text for turn in turns if turn.role == "user"):
        return turns
    marked = Turn("user", "\n".join([IMAGE_MARK] * pictures + [turns[first].text]))
    return (*turns[:first], marked, *turns[first + 1 :])


def read_grading(record: Mapping, name: str) -> Grading:
    """What a record, or a turn of it, says for evaluation. Raises BadSample, naming the record."""
    found = {key: record[key] for key in GRADING if record.get(key) is not None}
    if not found:
        return UNGRADED
    category = found.pop("category", None)
    if category is not None and (isinstance(category, bool) or not isinstance(category, str | int)):
        raise BadSample(f"{name}: 'category' must be a text, got {shown(category)}")
    lists = {key: tuple(_text_of(value, key, name) for value in filled_list(found[key], key, name)) for key in found}
    if 0 < len(lists.get("answers", ())) < FEWEST_ANSWERS:
        said = shown(found["answers"])
        raise BadSample(f"{name}: 'answers' are those of {FEWEST_ANSWERS} people or more (VQA has ten), got {said}")
    return Grading(None if category is None else str(category), **lists)


def _text_of(value: object, key: str, name: str) -> str:
    """A text, also where it stands as VQA's annotations have it, ``{"answer": "red", ...}``."""
    text = value.get("answer") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise BadSample(f"{name}: '{key}' must be a list of texts, got {shown(value)}")
    return text


def graded(turns: tuple[Turn, ...], record: Mapping, name: str) -> tuple[Turn, ...]:
    """Turns with what their record says for evaluation.

    Raises BadSample if it does not say of which turn it speaks, or if an answer is none of its choices.
    """
    grading = read_grading(record, name)
    if grading != UNGRADED:
        spoken = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if replace(grading, category=None) != UNGRADED and len(spoken) > 1:
            raise BadSample(
                f"{name}: answers, captions and choices of a record with {len(spoken)} answers must stand in the turns"
            )
        turns = tuple(
            replace(turn, grading=_together(turn.grading, grading)) if turn.role == "assistant" else turn
            for turn in turns
        )
    for turn in turns:
        choices = [choice.strip() for choice in turn.grading.choices]
        if choices and turn.text.strip() not in choices:
            raise BadSample(f"{name}: the answer {shown(turn.text)} is none of its 'choices', {shown(choices)}")
    return turns


def _together(own: Grading, whole: Grading) -> Grading:
    """A turn's own, and what is left of its record's."""
    return Grading(*(mine or theirs for mine, theirs in zip(vars(own).values(), vars(whole).values())))
