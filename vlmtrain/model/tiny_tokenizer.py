"""A small tokenizer built in code, for runs without downloads."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# A minimal template: one token for the role of each turn, and one after each answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tiny_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer with the vocabulary `words` and a chat template without a system prompt.

    Each word is one token, with and without a leading space. All other text falls back to bytes, so every
    string survives encoding and decoding. The same words in the same order give the same ids.

    Raises ValueError for a word that GPT-2's pre-tokenizer splits, because it cannot be one token.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for word in words:
        for text in (word, " " + word):
            pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
            if len(pieces) != 1:
                raise ValueError(f"words: {word!r} cannot be one token, it is split into {pieces}")
            vocabulary.setdefault(pieces[0], len(vocabulary))

    # Complete words are looked up directly (`ignore_merges`), so no merges are needed for them.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, *ROLES, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
