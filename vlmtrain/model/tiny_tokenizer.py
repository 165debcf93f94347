"""A small tokenizer made in code, for runs that download nothing."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows `words`, with a ChatML template and no system prompt.

    Each word is one token, with and without a space before it, and so are the three role names; all
    other text falls back to bytes, so every string survives encoding and decoding. The same words in the
    same order give the same ids. The end-of-turn token has the highest id, which is where CLIP text
    towers that pool at the largest id look.

    Raises ValueError for a word that GPT-2's splitting rule cuts in two, since it could not be one token.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for word in (*ROLES, *words):
        for text in (word, " " + word):
            pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
            if len(pieces) != 1:
                raise ValueError(f"words: {word!r} cannot be one token, it is split into {pieces}")
            vocabulary.setdefault(pieces[0], len(vocabulary))

    # Whole words are looked up directly (`ignore_merges`), so that no merge table has to spell them out.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, TURN_START, TURN_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
