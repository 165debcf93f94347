"""The actions of a record, and the marks in its answers that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from ..errors import is_finite_number, shown
from .actions import ACTION_MARK, Action, Binning
from .record_media import Said
from .records import BadSample, Conversation, Turn, action_marks


def read_actions(value: object, key: str, name: str) -> tuple[Action, ...]:
    """The actions of a record, which are a list of vectors, or a single vector. Raises BadSample."""
    vectors = [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value
    is_read = isinstance(vectors, list) and all(isinstance(each, list) and each for each in vectors)
    if not is_read or not all(is_finite_number(number) for vector in vectors for number in vector):
        raise BadSample(f"{name}: '{key}' must be a list of lists of finite numbers, got {shown(value)}")
    return tuple(tuple(map(float, vector)) for vector in vectors)


def with_actions(said: Sequence[Said], actions: Sequence[Action], key: str, name: str) -> list[Said]:
    """Turns with the actions of their marks. Raises BadSample unless there is one for each mark."""
    marks = sum(map(action_marks, (each.turn for each in said)))
    if marks != len(actions):
        raise BadSample(
            f"{name}: {marks} {ACTION_MARK} marks in the answers, but {len(actions)} '{key}'; data.ignore=[{key}] "
            "trains on the text as it is"
        )
    waiting = iter(actions)
    return [each._replace(actions=tuple(islice(waiting, action_marks(each.turn)))) for each in said]


def write_actions(conversation: Conversation, binning: Binning) -> Conversation:
    """The conversation with the tokens of its actions in place of their marks. Raises BadSample, naming it."""
    marks, waiting = sum(map(action_marks, conversation.turns)), iter(conversation.actions)
    if marks != len(conversation.actions):
        raise BadSample(
            f"{conversation.id}: {marks} {ACTION_MARK} marks in the answers, but {len(conversation.actions)} actions"
        )

    def written(turn: Turn) -> Turn:
        if not action_marks(turn):
            return turn
        first, *rest = turn.text.split(ACTION_MARK)
        text = first + "".join(binning.encode(next(waiting)) + words for words in rest)
        return replace(turn, text=text, grading=replace(turn.grading, actions=binning))

    try:
        return replace(conversation, turns=tuple(map(written, conversation.turns)), actions=())
    except ValueError as error:
        raise BadSample(f"{conversation.id}: {error}") from None
