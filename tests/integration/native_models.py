"""Random models of native resolution as they are published: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and HunyuanOCR."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HunYuanVLImageProcessorPil,
    HunYuanVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.integration.tiny_parts import LOOK

PATCH, WIDTH, OUT, DEPTH = 4, 16, 32, 3
LIMITS = {"shortest_edge": 16 * PATCH * PATCH, "longest_edge": 64 * PATCH * PATCH}
VIDEO_LIMITS = {
    "qwen2_vl": LIMITS,
    "qwen2_5_vl": LIMITS,
    "qwen3_vl": {"shortest_edge": 64 * PATCH * PATCH, "longest_edge": 512 * PATCH * PATCH},  # of all frames
}
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "hunyuan_vl": (HunYuanVLConfig, HunYuanVLForConditionalGeneration, HunYuanVLProcessor, None),
}
VISION = {
    "qwen2_vl": {"depth": DEPTH, "num_heads": 2, "embed_dim": WIDTH, "hidden_size": OUT, "mlp_ratio": 2},
    "qwen2_5_vl": {"depth": DEPTH, "num_heads": 2, "hidden_size": WIDTH, "intermediate_size": 20}
    | {"out_hidden_size": OUT, "window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    "qwen3_vl": {"depth": DEPTH, "num_heads": 2, "hidden_size": WIDTH, "intermediate_size": 20}
    | {"out_hidden_size": OUT, "num_position_embeddings": 49, "deepstack_visual_indexes": [0, 1]},
    "hunyuan_vl": {"num_hidden_layers": DEPTH, "num_attention_heads": 2, "hidden_size": WIDTH}
    | {"intermediate_size": 20, "max_image_size": 8 * PATCH, "min_image_size": 4 * PATCH},
}
TEXT = {"hidden_size": OUT, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
SECTIONS = {"qwen2_vl": [2, 3, 3], "qwen2_5_vl": [2, 3, 3], "qwen3_vl": [4, 2, 2], "hunyuan_vl": [2, 2, 2, 2]}
QWEN_WORDS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
HUNYUAN_WORDS = ["<begin>", "<end>", "<user>", "<image_begin>", "<image_end>", "<image_pad>"]
# as the published ones: text may be a string or items, images are items, and there may be a system line by default
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' and DEFAULT %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif item['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HUNYUAN_TEMPLATE = (
    "{{ '<begin>' }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<image_begin><image_pad><image_end>' }}"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<user>' if message['role'] == 'user' else '<end>' }}{% endfor %}"
)


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the family's control tokens."""
    words = HUNYUAN_WORDS if family == "hunyuan_vl" else QWEN_WORDS
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ["<pad>", *words]])
    names = {"eos_token": words[1], "pad_token": "<pad>"}
    if family == "hunyuan_vl":
        names |= {"image_token": words[5], "image_start_token": words[3], "image_end_token": words[4]}
        template = HUNYUAN_TEMPLATE
    else:
        template = QWEN_TEMPLATE.replace("DEFAULT", "false" if family == "qwen3_vl" else "true")
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    found.padding_side = found.init_kwargs["padding_side"] = "left"
    found.chat_template = template
    return found


def scaled(module: nn.Module, gain: float = 1.3) -> nn.Module:
    """Weights with which images and positions matter; a larger gain amplifies differences."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_table = "embed" in name and parameter.dim() == 2
            if parameter.dim() < 2:
                parameter.copy_(0.2 * noise + (1.0 if "norm" in name and "bias" not in name else 0.0))
            else:
                parameter.copy_(noise if is_table else gain * noise / parameter[0].numel() ** 0.5)
    return module.eval()


def build_native(folder: Path, family: str, tied: bool = False, **options) -> nn.Module:
    """Write a random model of a family in Hugging Face's format, and return it."""
    config_class, model_class, processor_class, video_class = CLASSES[family]
    tokenizer = tokenizer_of(family)
    words = HUNYUAN_WORDS if family == "hunyuan_vl" else QWEN_WORDS
    ids = dict(zip(words, tokenizer.convert_tokens_to_ids(words)))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": SECTIONS[family]}
    text = {**TEXT, "vocab_size": len(tokenizer) + 2, "bos_token_id": None, "eos_token_id": ids[words[1]]}
    text |= {"pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": tied or family == "hunyuan_vl"}
    if family == "hunyuan_vl":
        rope |= {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0}
        places = {"im_start_id": ids[words[3]], "im_end_id": ids[words[4]], "image_token_id": ids[words[5]]}
    else:
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        places = dict(zip(names, (ids[word] for word in words[2:])))
    if family in ("qwen3_vl", "hunyuan_vl"):
        text["head_dim"] = 16
    vision = {**VISION[family], "patch_size": PATCH}
    config = config_class(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **places,
        **options,
    )
    model = scaled(model_class(config))
    model.generation_config.eos_token_id = ids[words[1]]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    shape = {"patch_size": PATCH, "merge_size": 2}
    if family == "hunyuan_vl":
        processor = HunYuanVLProcessor(HunYuanVLImageProcessorPil(**LOOK, **shape, size=LIMITS), tokenizer)
    else:
        images = Qwen2VLImageProcessorPil(**LOOK, **shape, size=LIMITS)
        videos = video_class(**LOOK, **shape, size=VIDEO_LIMITS[family])
        processor = processor_class(images, tokenizer, videos, chat_template=tokenizer.chat_template)
    processor.save_pretrained(folder)
    return model
