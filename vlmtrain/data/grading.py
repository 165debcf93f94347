"""Annotations of assistant turns that evaluation uses: categories, several annotators' answers, captions, choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import shown
from .records import UNGRADED, BadSample, Grading, Turn

GRADING = ("category", "answers", "captions", "choices")
"""Keys of a record, or of its assistant turn, that evaluation uses."""
FEWEST_ANSWERS = 4  # VQA compares with all but one annotator and needs three to agree for full accuracy


def read_grading(record: Mapping) -> Grading:
    """Annotations of a record or a turn. Those that evaluation cannot use are described by `Grading.problem`."""
    found = {key: record[key] for key in GRADING if record.get(key) is not None}
    try:
        return _read(found) if found else UNGRADED
    except ValueError as error:
        return Grading(problem=str(error))


def _read(found: dict) -> Grading:
    category = found.pop("category", None)
    if category is not None and (isinstance(category, bool) or not isinstance(category, str | int)):
        raise ValueError(f"'category' must be a string, got {shown(category)}")
    lists = {}
    for key, value in found.items():
        if not isinstance(value, list) or not value:
            raise ValueError(f"'{key}' must be a non-empty list, got {shown(value)}")
        lists[key] = tuple(_text_of(item, key) for item in value)
    if 0 < len(lists.get("answers", ())) < FEWEST_ANSWERS:
        said = shown(found["answers"])
        raise ValueError(f"'answers' must be of at least {FEWEST_ANSWERS} annotators (VQA has ten), got {said}")
    return Grading(None if category is None else str(category), **lists)


def _text_of(value: object, key: str) -> str:
    """A string, or a number as one, also from the form of VQA's annotations, ``{"answer": "red", ...}``."""
    text = value.get("answer") if isinstance(value, dict) else value
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"'{key}' must be a list of strings, got {shown(value)}")
    return str(text)


def graded(turns: tuple[Turn, ...], record: Mapping) -> tuple[Turn, ...]:
    """Add the annotations of a record to its assistant turns.

    It is a problem of the turn if the record has several answers, or if its answer is not one of the choices.
    """
    grading = read_grading(record)
    spoken = sum(turn.role == "assistant" for turn in turns)
    if spoken > 1 and (grading.answers or grading.captions or grading.choices):
        problem = f"the record has {spoken} answers: put answers, captions and choices into its turns"
        grading = Grading(problem=problem)
    return tuple(
        replace(turn, grading=_checked(turn.text, _together(turn.grading, grading)))
        if turn.role == "assistant"
        else turn
        for turn in turns
    )


def _together(own: Grading, whole: Grading) -> Grading:
    """Annotations of the turn, completed by those of its record."""
    return Grading(*(mine or theirs for mine, theirs in zip(vars(own).values(), vars(whole).values())))


def _checked(answer: str, grading: Grading) -> Grading:
    choices = [choice.strip() for choice in grading.choices]
    if choices and answer.strip() not in choices:
        problem = f"the answer {shown(answer)} is not one of its 'choices', {shown(choices)}"
        return replace(grading, problem=grading.problem or problem)
    return grading


def check_grading(name: str, turns: tuple[Turn, ...]) -> None:
    """Raise BadSample, naming the record, if evaluation cannot use the annotations of a turn."""
    for turn in turns:
        if turn.grading.problem:
            raise BadSample(f"{name}: {turn.grading.problem}")
