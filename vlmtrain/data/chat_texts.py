"""The text that a chat template puts around the turns of a conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from ..errors import first_line
from .records import BadSample, Conversation, Turn

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters, which no template treats specially
_ONCE = (Turn("user", "question"), Turn("assistant", "answer"))


class ChatTexts:
    """Applies a Jinja template to turns.

    no_system: why the template does not support a system turn; None if it does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str):
        self.tokenizer, self.template = tokenizer, template
        self._literals: dict[tuple, list[str]] = {}  # results of `between`, by roles
        self._looks_ahead = False  # whether the text before an answer depends on what follows it
        self.no_system: str | None = None

    def probe(self) -> None:
        """Determine how the template, which can render one exchange, treats system turns and further exchanges."""
        try:
            self.between((Turn("system", "words"), *_ONCE))
        except ValueError as error:
            self.no_system = str(error)
        with suppress(ValueError):  # a template may support only one exchange
            self._looks_ahead = self.between(_ONCE)[:2] != self.between(_ONCE * 2)[:2]

    def around(self, turns: Sequence[Turn]) -> list[str]:
        """The template's text before each turn and after the last one; before answers, as in a generation prompt.

        Raises ValueError unless the template renders every turn once and in order.
        """
        texts = self.between(turns)
        return self._as_asked(turns, texts) if self._looks_ahead else texts

    def between(self, turns: Sequence[Turn]) -> list[str]:
        """The template's text before each turn and after the last one. Raises ValueError if it omits a turn."""
        shape = tuple((turn.role, is_silent(turn)) for turn in turns)
        if shape not in self._literals:
            # a system turn without text has no placeholder, because a template may omit it
            contents = ["" if silent else f"{_OPEN}{i}{_CLOSE}" for i, (_, silent) in enumerate(shape)]
            pieces = re.split(f"{_OPEN}(\\d+){_CLOSE}", self._applied(turns, contents))
            seen = [int(index) for index in pieces[1::2]]
            if seen != [i for i, content in enumerate(contents) if content]:
                raise ValueError(
                    f"the chat template does not render every turn once and in order (turns rendered: {seen}, of "
                    f"{len(turns)}); choose another with the stage's template"
                )
            self._literals[shape] = [""] * (len(turns) - len(seen)) + pieces[::2]
        return self._literals[shape]

    def check_words(self, conversation: Conversation) -> None:
        """Raise BadSample if the template changes the text of turns, as reasoning templates cut at </think>."""
        words = [turn.text.strip() for turn in conversation.turns]
        for _ in range(2):
            try:
                texts, whole = self.between(conversation.turns), self._applied(conversation.turns, words)
            except ValueError as error:
                raise BadSample(f"{conversation.id}: {error}") from None
            if whole == texts[0] + "".join(said + after for said, after in zip(words, texts[1:])):
                return
            self._literals.clear()  # a template may contain the date, which may have changed
        raise BadSample(
            f"{conversation.id}: the chat template would change the text, as reasoning templates do with a "
            "<think> block; choose another with the stage's template"
        )

    def _as_asked(self, turns: Sequence[Turn], texts: list[str]) -> list[str]:
        """`texts` with the text before each answer as if it were the last turn, as in a generation prompt."""
        texts, start = list(texts), 0
        for end, turn in enumerate(turns, 1):
            if turn.role == "assistant":
                texts[start:end] = self.between(turns[:end])[start:end]
                start = end
        return texts

    def _applied(self, turns: Sequence[Turn], contents: Sequence[str]) -> str:
        messages = [{"role": turn.role, "content": content} for turn, content in zip(turns, contents)]
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        except Exception as error:  # templates are programs and can raise any exception
            raise ValueError(f"the chat template rejects the conversation: {first_line(error)}") from None


def is_silent(turn: Turn) -> bool:
    """Whether a turn is a system prompt without text."""
    return turn.role == "system" and not turn.text.strip()
