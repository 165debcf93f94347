"""Text for connectors that read text (Q-Former, MEQ-Former), in a separate vocabulary.

conversation -> the text that belongs to each image -> [CLS] text [SEP]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .records import IMAGE_MARK, Conversation

READS = ("instruction", "answer")


class TextVocabulary(NamedTuple):
    """Number of ids, and the two ids that start and end every text: BERT's [CLS] and [SEP].

    The last id, [DEC], starts a text that is generated instead of read (BLIP-2, section 3.1).
    """

    size: int
    start: int
    end: int


def text_vocabulary(tokenizer: PreTrainedTokenizerBase) -> TextVocabulary:
    """The ids of a tokenizer, followed by ids for [CLS] and [SEP] (or end of text) if it has none, and for [DEC].

    For example, BERT's 30522 ids become BLIP-2's 30523.
    """
    size, ids = len(tokenizer), []
    end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    for found in (tokenizer.cls_token_id, end):
        ids.append(size if found is None else found)
        size += found is None
    has_last = tokenizer.get_vocab().get("[DEC]") == size - 1  # as in the published InstructBLIP tokenizer
    return TextVocabulary(size if has_last else size + 1, *ids)


class TextReader:
    """Encodes the text that belongs to each image of a conversation.

    reads: ``instruction``, the user's text in the turn of the image (InstructBLIP, section 2.3), or ``answer``, the
    assistant's answer to it. Later turns about an image do not change its tokens, because these come before all of
    those turns. max_length: maximum number of ids; an instruction is cut at its beginning, an answer at its end
    (published code of InstructBLIP and BLIP-2). Raises ValueError for any other `reads` and for lengths below two.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reads: str, max_length: int):
        if reads not in READS:
            raise ValueError(f"connector_text.read={reads}: expected one of {', '.join(READS)}, or null")
        if max_length < 2:
            raise ValueError(f"connector_text.max_length={max_length}: expected at least 2, for [CLS] and [SEP]")
        self.tokenizer, self.reads, self.max_length = tokenizer, reads, max_length
        self.vocabulary = text_vocabulary(tokenizer)

    def __call__(self, conversation: Conversation) -> list[Tensor]:
        """Ids ``(T,)`` for each image."""
        return [self.encode(words) for words in self._words(conversation)]

    def encode(self, words: str) -> Tensor:
        """Ids ``(T,)`` of a text. Special-token strings in it are encoded as ordinary text."""
        ids = self.tokenizer(words, add_special_tokens=False, split_special_tokens=True).input_ids
        room = self.max_length - 2
        ids = ids[max(0, len(ids) - room) :] if self.reads == "instruction" else ids[:room]
        return torch.tensor([self.vocabulary.start, *ids, self.vocabulary.end])

    def _words(self, conversation: Conversation) -> list[str]:
        words = []
        turns = conversation.turns
        for turn, answer in zip(turns, [*turns[1:], None]):
            if turn.role == "user":
                said = turn.text if self.reads == "instruction" else answer.text if answer else ""
                words += [said.replace(IMAGE_MARK, "").strip()] * turn.text.count(IMAGE_MARK)
        return words


def pad_texts(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids ``(N, T)``, padded on the right, and a mask that is True at real tokens."""
    mask = pad_sequence([torch.ones_like(text, dtype=torch.bool) for text in texts], batch_first=True)
    return pad_sequence(texts, batch_first=True), mask
