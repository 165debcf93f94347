"""A random IDEFICS as it is published."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    PreTrainedTokenizerBase,
)

from vlmtrain.interop.idefics import END, FAKE

from .native_models import scaled
from .tiny_parts import PATCH, SIDE, byte_tokenizer

IMAGE = "<image>"
VISION = {"embed_dim": 16, "image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": 2, "num_attention_heads": 2}
RESAMPLER = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 6}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def idefics_tokenizer(spaces: str, *words: str) -> PreTrainedTokenizerBase:
    """Characters, then the control tokens of IDEFICS and `words`. spaces: before which texts one is added."""
    tokenizer = byte_tokenizer(spaces)
    added = [AddedToken(word, special=True, normalized=False) for word in (FAKE, IMAGE, *words)]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def build_idefics(
    folder: Path, resampler: bool = True, dialogue: bool = True, spare: int = 0, spaces: str = "first", **options
) -> nn.Module:
    """Write a random IDEFICS in Hugging Face's format, and return it.

    resampler: whether it has one. dialogue: whether it is one for dialogue. spare: rows that no token has. spaces:
    before which texts the tokenizer adds one. options: of the configuration.
    """
    tokenizer = idefics_tokenizer(spaces, *([END] if dialogue else []))
    base = tokenizer.convert_tokens_to_ids(FAKE)
    norms = options.get("qk_layer_norms", True)
    config = IdeficsConfig(
        **{
            **TEXT,
            "vocab_size": base,
            "additional_vocab_size": len(tokenizer) - base + spare,
            "cross_layer_interval": 2,
            "qk_layer_norms": norms,
            "vision_config": {**VISION, "intermediate_size": 24},
            "perceiver_config": {**RESAMPLER, "use_resampler": resampler, "qk_layer_norms_perceiver": norms},
            "use_resampler": resampler,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **options,
        }
    )
    torch.manual_seed(0)
    model = scaled(IdeficsForVisionText2Text(config))
    with torch.no_grad():
        for name, gate in model.named_parameters():
            if "alpha" in name:
                gate.copy_(0.8 + 0.4 * torch.rand(gate.shape))
    model.generation_config.suppress_tokens = tokenizer.convert_tokens_to_ids([FAKE, IMAGE])
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(END), 2] if dialogue else 2
    model.save_pretrained(folder)
    IdeficsProcessor(IdeficsImageProcessorPil(image_size=SIDE), tokenizer).save_pretrained(folder)
    return model
