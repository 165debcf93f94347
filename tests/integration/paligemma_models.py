"""A random PaliGemma, or PaliGemma 2, as it is published."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from tests.integration.tiny_parts import GROUPED, PATCH, SIDE, WIDE, byte_tokenizer, stir

TEXTS = {
    "paligemma": GemmaConfig,
    "paligemma2": lambda **o: Gemma2Config(**o, sliding_window=256, final_logit_softcapping=3.0),
}


def build_paligemma(folder: Path, kind: str = "paligemma", **options) -> nn.Module:
    """Write a random PaliGemma in Hugging Face's format, and return it. options: of its image processor."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer("never")
    tokenizer.pad_token = "<pad>"
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    look = {"size": {"height": SIDE, "width": SIDE}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = SiglipImageProcessorPil(**look | options)
    images.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(images, tokenizer)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = TEXTS[kind](**GROUPED, **ids, vocab_size=len(processor.tokenizer), tie_word_embeddings=True)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**WIDE, vision_use_head=False).to_dict(),
        text_config=text.to_dict(),
        image_token_index=processor.image_token_id,
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )
    model = stir(PaliGemmaForConditionalGeneration(config))
    with torch.no_grad():  # tied as it is, a large table would repeat the last token
        model.get_input_embeddings().weight.mul_(0.1)
    model.generation_config.eos_token_id = 2
    model.generation_config.suppress_tokens = [processor.image_token_id]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model
