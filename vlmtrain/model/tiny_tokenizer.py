"""A small tokenizer made in code, for runs that download nothing."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# As short as a template can be: a token for whose turn it is, and one behind each answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tiny_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows `words`, with a chat template and no system prompt.

    Each word is one token, with and without a space before it; all other text falls back to bytes, so
    every string survives encoding and decoding. The same words in the same order give the same ids.

    Raises ValueError for a word that GPT-2's splitting rule cuts in two, since it could not be one token.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for word in words:
        for text in (word, " " + word):
            pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
            if len(pieces) != 1:
                raise ValueError(f"words: {word!r} cannot be one token, it is split into {pieces}")
            vocabulary.setdefault(pieces[0], len(vocabulary))

    # Whole words are looked up directly (`ignore_merges`), so that no merge table has to spell them out.
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
