"""Tokenizers of every kind, built in code, and the chat templates of well-known model families."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmtrain.data.shapes import VOCABULARY
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer

# Only the first three are named in the tokenizer; the others are merely added, as in Llama-3 and Phi-3.
SPECIALS = (
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
SWALLOWS_SPACE = ("<|user|>", "<|assistant|>", "<|end|>")
"""Tokens that take the white space behind them, as in Phi-3."""

CHARACTERS = [chr(code) for code in range(33, 127)] + ["é", "…", "\n"]
WORDS = "What what color is the this red circle a square and blue How many USER ASSISTANT answer".split()
CORPUS = [" ".join(WORDS), "USER: What color is the circle? ASSISTANT: red", "a red circle and a blue square.\n"] * 4


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    added = [AddedToken(t, special=True, normalized=False, rstrip=t in SWALLOWS_SPACE) for t in SPECIALS]
    tokenizer.add_special_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def unigram(prepend_scheme: str) -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram: a space before every text, control tokens among the vocabulary's pieces."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0)]
    pieces += [(character, -8.0) for character in CHARACTERS]
    pieces += [(f"▁{word}", -5.0) for word in WORDS] + [(word, -6.0) for word in WORDS if len(word) > 1]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    return _finish(_with_bos(tokenizer))


def llama_bpe() -> PreTrainedTokenizerFast:
    """Llama-2's kind: BPE on the whole text, a space prepended by the normaliser, bytes for the unknown."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    for character in ["▁", *CHARACTERS]:
        if character != "\n":
            vocabulary.setdefault(character, len(vocabulary))
    merges = []
    for word in [f"▁{word}" for word in WORDS]:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(_with_bos(tokenizer))


def byte_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the splitting rule of GPT-4, Llama-3 and Qwen."""
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finish(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: white space is lost, words fall into pieces."""
    letters = [character for character in CHARACTERS if character != "\n"]
    pieces = ["[UNK]", *letters, *(f"##{character}" for character in letters), *WORDS]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _finish(tokenizer)


def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    tiny = build_tiny_tokenizer(VOCABULARY)
    tiny.add_special_tokens({"bos_token": "<s>"})
    extra = [t for t in SPECIALS if t not in tiny.get_vocab()]
    tiny.add_tokens([AddedToken(t, special=True, rstrip=t in SWALLOWS_SPACE) for t in extra])
    return {
        "tiny": tiny,
        "unigram_always": unigram("always"),
        "unigram_first": unigram("first"),
        "llama_bpe": llama_bpe(),
        "byte_bpe": byte_bpe(),
        "wordpiece": wordpiece(),
    }


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA_3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

END_OF_TURN = {
    "vicuna_v1": "eos",
    "chatml": "<|im_end|>",
    "llama_2": "eos",
    "llama_3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi_3": "<|end|>",
}
OWN_TEMPLATES = {"chatml": CHATML, "llama_2": LLAMA_2, "llama_3": LLAMA_3, "gemma": GEMMA, "phi_3": PHI_3}
"""Templates that a tokenizer brings along; ``vicuna_v1`` is the project's own."""
