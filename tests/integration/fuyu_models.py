"""A random Fuyu as it is published."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import nn
from transformers import (
    FuyuConfig,
    FuyuForCausalLM,
    FuyuImageProcessorPil,
    FuyuProcessor,
    PersimmonConfig,
    PreTrainedTokenizerFast,
)

from .native_models import scaled

PATCH, LARGEST = 6, {"height": 36, "width": 48}
IMAGE, NEWLINE, ANSWER, END = "|SPEAKER|", "|NEWLINE|", "<0x04>", "|ENDOFTEXT|"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}


def fuyu_tokenizer() -> PreTrainedTokenizerFast:
    """Characters and Fuyu's control words; like SentencePiece's, it writes a space before each text."""
    pieces = [("<unk>", 0.0), *((word, 0.0) for word in (IMAGE, NEWLINE, ANSWER)), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ("<s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=END, unk_token="<unk>")


def build_fuyu(folder: Path, **options) -> nn.Module:
    """Write a random Fuyu in Hugging Face's format, and return it. options: of its image processor."""
    tokenizer = fuyu_tokenizer()
    text = PersimmonConfig(**TEXT, vocab_size=len(tokenizer) + 2, bos_token_id=None, eos_token_id=None)
    config = FuyuConfig(
        text_config=text.to_dict(), patch_size=PATCH, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE)
    )
    torch.manual_seed(0)
    model = scaled(FuyuForCausalLM(config))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.suppress_tokens = [config.image_token_id]
    model.save_pretrained(folder)
    look = {"patch_size": {"height": PATCH, "width": PATCH}, "size": LARGEST}
    FuyuProcessor(FuyuImageProcessorPil(**look | options), tokenizer).save_pretrained(folder)
    return model
