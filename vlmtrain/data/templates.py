"""Chat templates by name, for language models whose tokenizer has none."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from ..errors import nearest

# Vicuna v1.1's conversation, as LLaVA-1.5 uses it (published code, `conv_vicuna_v1`).
VICUNA_V1 = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' %}"
    "{% set turns = messages %}{% endif %}"
    "{{ system }}"
    "{% for turn in turns %}"
    "{% if turn.role == 'user' %}{{ (' ' if loop.first else '') + 'USER: ' + turn.content }}"
    "{% else %}{{ ' ASSISTANT: ' + turn.content + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

# For models whose own template parses the text of turns (Qwen-3's searches for </think>).
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Only the text: the question, a space, the answer and its end, as in InstructBLIP's training (published code).
BARE = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{% if turn.role == 'assistant' %}{{ ' ' + turn.content + eos_token }}"
    "{% elif turn.role == 'system' %}{{ turn.content + ' ' }}"
    "{% else %}{{ turn.content }}{% endif %}"
    "{% endfor %}"
)

# The same text as `bare`, but all images come first, as in BLIP-2 and InstructBLIP (published code: the tokens of the
# queries, the language model's beginning-of-text token, the text).
BLIP = "blip"

# All images come first, then the text, whose questions end with the token <0x04> (Fuyu, published code).
FUYU = "fuyu"
_FUYU = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{% if turn.role == 'assistant' %}{{ turn.content + eos_token }}"
    "{% elif turn.role == 'system' %}{{ turn.content + ' ' }}"
    "{% else %}{{ turn.content + '<0x04>' }}{% endif %}"
    "{% endfor %}"
)

# All images come first, then the text, whose questions end with a newline (PaliGemma, 2024, section 3.1).
PALIGEMMA = "paligemma"
_PALIGEMMA = _FUYU.replace("<0x04>", "\n")

# The images of each question come before the word that marks it (Otter, published code, with the spaces of the paper).
OTTER = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{% if turn.role == 'user' %}{{ '<image>User: ' + turn.content + ' GPT:<answer>' }}"
    "{% elif turn.role == 'assistant' %}{{ ' ' + turn.content + '<|endofchunk|>' }}{% endif %}"
    "{% endfor %}"
)

# The conversations of IDEFICS-instruct (model card), whose images write the tokens around them.
IDEFICS = "idefics"
_IDEFICS = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{% if turn.role == 'system' %}{{ turn.content + '\n' }}"
    "{% else %}{{ ('' if loop.first else '\n') + ('User: ' if turn.role == 'user' else 'Assistant: ') }}"
    "{{ turn.content + '<end_of_utterance>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"
)

TEMPLATES = {
    **{"vicuna_v1": VICUNA_V1, "chatml": CHATML, "bare": BARE, BLIP: BARE},
    **{FUYU: _FUYU, PALIGEMMA: _PALIGEMMA, IDEFICS: _IDEFICS, "otter": OTTER},
}
IMAGES_FIRST = {BLIP, FUYU, PALIGEMMA}
CAPTIONS = ("plain", "prefix")
"""Templates that render only images and the answer; ``prefix`` trains the answer from a random place on."""

# The text of documents, all of which is trained on, with images in between; see `Renderer`.
INTERLEAVED = "interleaved"
CHUNK_END = "<|endofchunk|>"
"""Token after the text that follows an image (Flamingo, 2022; OpenFlamingo's name), if the tokenizer has it."""

NAMES = (*CAPTIONS, "chat", INTERLEAVED, *TEMPLATES)


def chat_template(name: str, tokenizer: PreTrainedTokenizerBase, fallback: str | None) -> str:
    """The Jinja template with this `name` for a tokenizer.

    ``chat`` is the tokenizer's own template, or else `fallback`, which is a name or a template; any other name takes
    precedence over the tokenizer's template.
    """
    if name == "chat":
        if isinstance(tokenizer.chat_template, dict):  # several, by name
            if "default" in tokenizer.chat_template:
                return tokenizer.chat_template["default"]
            named = ", ".join(tokenizer.chat_template)
            raise ValueError(f"template=chat: the tokenizer has no default among its chat templates {named}")
        if tokenizer.chat_template:
            return tokenizer.chat_template
        if fallback is None:
            raise ValueError(
                "template=chat, but the tokenizer has no chat template: set llm.chat_template to one of "
                f"{', '.join(TEMPLATES)}, or the stage's template"
            )
        check_fallback(fallback, "llm.chat_template")
        return TEMPLATES.get(fallback, fallback)
    if name not in TEMPLATES:
        raise ValueError(f"unknown template '{name}'.{nearest(name, NAMES)} Available: {', '.join(NAMES)}")
    return TEMPLATES[name]


def check_fallback(template: object, key: str) -> None:
    """Raise ValueError unless `template` is None, one of `TEMPLATES`, or a Jinja template."""
    if template is None or (isinstance(template, str) and (template in TEMPLATES or re.search(r"{[{%]", template))):
        return
    raise ValueError(
        f"{key}={template}: unknown template.{nearest(str(template), TEMPLATES)} Available: {', '.join(TEMPLATES)}, or "
        "a Jinja template"
    )
