"""Random models as Molmo2 is published, with its tokens, crops and frames, and a template that puts images first."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from torch import nn
from transformers import (
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    PreTrainedTokenizerBase,
)

from tests.integration.native_models import scaled, tokenizer_of
from tests.integration.tiny_parts import LOOK
from vlmtrain.interop.molmo2 import IMAGE, VIDEO, WORDS

SIDE, PATCH, CROPS = 40, 8, 4
SIZE = {"size": {"height": SIDE, "width": SIDE}, "patch_size": PATCH}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8}
VISION |= {"num_key_value_heads": 2, "image_size": [SIDE, SIDE], "patch_size": PATCH}
ADAPTER = {"vision_feature_layer": [3, 1], "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
ADAPTER |= {"head_dim": 8, "intermediate_size": 24, "text_hidden_size": 32}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024}
# As the published one: all images first, numbered if there are several, then the text; the last answer does not end.
IMAGES_FIRST = (
    "{% set seen = namespace(images=0, videos=0) %}"
    "{% for message in messages %}{% if message['content'] is not string %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{% set seen.images = seen.images + 1 %}"
    "{% elif item['type'] == 'video' %}{% set seen.videos = seen.videos + 1 %}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% for number in range(seen.images) %}"
    "{{ ('Image ' ~ (number + 1) if seen.images > 1 else '') ~ '<|image|>' }}{% endfor %}"
    "{{ '<|video|>' * seen.videos }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ '<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>user\n' }}{% else %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IN_PLACE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}{{ item['text'] }}{% else %}{{ '<|' + item['type'] + '|>' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def molmo2_tokenizer(template: str = IMAGES_FIRST) -> PreTrainedTokenizerBase:
    """A tokenizer of bytes whose last tokens are those of images and frames."""
    tokenizer = tokenizer_of("qwen3_vl")
    tokenizer.add_tokens(
        [AddedToken(word, special=True, normalized=False) for word in (*WORDS, IMAGE, VIDEO)], special_tokens=True
    )
    tokenizer.bos_token = tokenizer.eos_token  # as published
    tokenizer.chat_template = template
    return tokenizer


def build_molmo2(
    folder: Path,
    template: str = IMAGES_FIRST,
    text: dict | None = None,
    vision: dict | None = None,
    adapter: dict | None = None,
    images: dict | None = None,
    videos: dict | None = None,
    ids: dict | None = None,
    **told,
) -> nn.Module:
    """Write a random Molmo2 in Hugging Face's format, and return it. told: arguments of its processor."""
    tokenizer = molmo2_tokenizer(template)
    known, new = tokenizer.get_vocab(), len(WORDS) + 2
    names = ("image_start_token_id", "low_res_image_start_token_id", "image_end_token_id", "image_patch_id")
    words = ("<im_start>", "<low_res_im_start>", "<im_end>", "<im_patch>")
    config = Molmo2Config(
        vision_config={**VISION, **(vision or {})},
        adapter_config={**ADAPTER, **(adapter or {})},
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer) - new,
            "additional_vocab_size": new + 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            **(text or {}),
        },
        frame_start_token_id=known["<frame_start>"],
        frame_end_token_id=known["<frame_end>"],
        **{**dict(zip(names, (known[word] for word in words))), **(ids or {})},
    )
    model = scaled(Molmo2ForConditionalGeneration(config), gain=1.0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    images = Molmo2ImageProcessor(**{**LOOK, **SIZE, "max_crops": CROPS, "overlap_margins": [1, 1], **(images or {})})
    videos = Molmo2VideoProcessor(**{**LOOK, **SIZE, "do_rescale": True, "do_normalize": True, **(videos or {})})
    told = {"use_single_crop_col_tokens": False, **told}
    Molmo2Processor(images, videos, tokenizer, chat_template=template, **told).save_pretrained(folder)
    return model
