"""Small random encoders, language models and tokenizers of the kinds that exports and imports handle."""

from __future__ import annotations

import torch
from timm.models import register_model, vision_transformer
from timm.models.eva import _create_eva
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    GPT2Config,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

SIDE, PATCH = 32, 8
LOOK = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
LLMS = {
    "llama": lambda **o: LlamaConfig(**GROUPED, **o),
    "llama, tied": lambda **o: LlamaConfig(**GROUPED, tie_word_embeddings=True, **o),
    "qwen2": lambda **o: Qwen2Config(**GROUPED, **o),
    "qwen2, rows to spare": lambda **o: Qwen2Config(**GROUPED, **{**o, "vocab_size": o["vocab_size"] + 7}),
    "qwen3": lambda **o: Qwen3Config(**GROUPED, **o),
    "phi3": lambda **o: Phi3Config(**GROUPED, **o),
    "gemma2, no cap": lambda **o: Gemma2Config(**GROUPED, final_logit_softcapping=None, **o),
    "gemma2": lambda **o: Gemma2Config(**GROUPED, final_logit_softcapping=3.0, **o),
    "opt": lambda **o: OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, **o),
    "gpt2": lambda **o: GPT2Config(n_embd=32, n_layer=2, n_head=4, **o),
}
COMMON = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
WIDE = {**COMMON, "intermediate_size": 32}
DINO = {**COMMON, "mlp_ratio": 2}
HF_VISION = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**WIDE)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=4)),
    "blip2": lambda: Blip2VisionModel(Blip2VisionConfig(**WIDE)),
    "instructblip": lambda: InstructBlipVisionModel(InstructBlipVisionConfig(**WIDE, qkv_bias=False)),
}


@register_model
def tiny_siglip(pretrained: bool = False, **options) -> nn.Module:
    """A small SigLIP image tower as timm builds it."""
    shape = {"patch_size": PATCH, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    shape |= {"class_token": False, "act_layer": "gelu_tanh"}
    return vision_transformer._create_vision_transformer("tiny_siglip", pretrained, **{**shape, **options})


@register_model
def tiny_eva(pretrained: bool = False, **options) -> nn.Module:
    """A small EVA-CLIP image tower as timm builds it."""
    shape = {"patch_size": PATCH, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    return _create_eva("tiny_eva", pretrained, **{**shape, "init_values": None, **options})


@register_model
def tiny_scaled_eva(pretrained: bool = False, **options) -> nn.Module:
    return tiny_eva(pretrained, **{"init_values": 0.3, **options})


TEXT_TOWER = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 16, "head_width": 8, "patch_size": PATCH},
    "text_cfg": TEXT_TOWER,
}


def timm_tower(name: str, pool: str, projection: str, width: int) -> dict:
    tower = {"timm_model_name": name, "timm_pool": pool, "timm_proj": projection, "image_size": SIDE}
    return {"embed_dim": width, "vision_cfg": tower, "text_cfg": TEXT_TOWER}


TOWERS = {
    "openai": {**OPEN_CLIP, "quick_gelu": True},
    "laion": OPEN_CLIP,
    "layer scale": {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "ls_init_value": 0.3}},
    "coca": {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2}},
    "no pre-norm": {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "no_ln_pre": True}},
    "timm vit": timm_tower("test_vit", "", "linear", 12),
    "timm siglip": timm_tower("tiny_siglip", "map", "none", 16),
    "eva": timm_tower("tiny_eva", "token", "none", 16),
    "scaled eva": timm_tower("tiny_scaled_eva", "token", "none", 16),
}


def stir(module: nn.Module) -> nn.Module:
    """Move the weights away from values where all outputs are alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(0.2 * torch.randn(parameter.shape))
    return module.eval()


def flan_t5(**options) -> T5ForConditionalGeneration:
    """A small FlanT5, with a head of its own, which transformers would tie to the embeddings."""
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    config = T5Config(**shape, decoder_start_token_id=0, eos_token_id=2, tie_word_embeddings=False, **options)
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight))
    return model


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Like T5's: a space before each text, and </s> behind it."""
    tokenizer = byte_tokenizer("always")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", 2)])
    tokenizer.bos_token, tokenizer.pad_token = None, "<pad>"
    return tokenizer


def byte_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """Like Llama-2's: spaces have their own symbol, one is added before the first word, and so is BOS."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "\u2581"])}
    for code in range(32, 127):
        vocabulary.setdefault(chr(code), len(vocabulary))
    for token in ("\n", "\u00e9"):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
