"""Vision encoders for BLIP-2 and InstructBLIP: a plain ViT with a class token and no norm before its blocks."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import Blip2VisionModel, InstructBlipVisionModel

from ..model.vision import HFVision, OpenClipVision, VisionEncoder
from .fitting import DoesNotFit, filled, relative_difference, tolerance
from .towers import CLIP_NAMES, TIMM_NAMES, check_square, gelu_name, renamed, scale_layers

FITTING = "EVA-CLIP or another open_clip ViT with a class token and no norm before its blocks, or BLIP-2's own encoder"

# BLIP-2's towers have no embedding module for positions, and another name for attention's output projection
_BLIP_NAMES = (
    (r"position_embedding\.weight$", "position_embedding"),
    (r"\.self_attn\.out_proj\.", ".self_attn.projection."),
)


@torch.no_grad()
def as_blip_tower(vision: VisionEncoder, norm: nn.LayerNorm, model_class: type[nn.Module]) -> nn.Module:
    """Convert `vision` up to its layer, followed by `norm`, to a `model_class`.

    model_class: Blip2VisionModel or InstructBlipVisionModel. Raises DoesNotFit for unsupported towers.
    """
    check_square(vision)
    depth = vision.layer if vision.layer > 0 else vision.num_blocks + vision.layer + 1
    state, shape = _plain_vit(vision)
    blocks = re.compile(r"encoder\.layers\.(\d+)\.")
    state = {name: each for name, each in state.items() if not (m := blocks.match(name)) or int(m[1]) < depth}
    state |= {f"post_layernorm.{name}": each for name, each in norm.state_dict().items()}
    config = model_class.config_class(
        hidden_size=vision.width,
        num_hidden_layers=depth,
        image_size=vision.image_size[0],
        patch_size=vision.patch_size[0],
        qkv_bias="encoder.layers.0.self_attn.qkv.bias" in state,
        **shape,
    )
    model = filled(model_class, config, state, next(vision.parameters()).dtype)
    probe = torch.randn(1, 3, *vision.image_size, generator=torch.Generator().manual_seed(0))
    probe = probe.to(next(vision.parameters()))
    features = vision.eval()(probe)
    expected = torch.cat([features.prefix, features.patches.flatten(1, 2)], dim=1)
    difference = relative_difference(model.eval()(probe).last_hidden_state, norm(expected))
    if not difference <= tolerance(probe.dtype):
        raise DoesNotFit(
            f"{model_class.__name__} with the weights of this image tower and connector.vision_norm gives different "
            f"features, by {difference:.1g} relative to the largest (eps of the norms: {norm.eps:g} and "
            f"{config.layer_norm_eps:g})"
        )
    return model


def _plain_vit(vision: VisionEncoder) -> tuple[dict[str, Tensor], dict]:
    """Tensors of all blocks under BLIP-2's names, and the corresponding configuration values."""
    if isinstance(vision, HFVision) and isinstance(vision.encoder, Blip2VisionModel | InstructBlipVisionModel):
        config = vision.encoder.config
        state = {name: t for name, t in vision.encoder.state_dict().items() if not name.startswith("post_layernorm.")}
        if config.image_size != vision.image_size[0]:
            nothing = state["embeddings.position_embedding"].new_empty(1, 0, vision.width)
            table = vision.encoder.embeddings.interpolate_pos_encoding(nothing, *vision.image_size)
            state["embeddings.position_embedding"] = table
        same = ("intermediate_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
        return state, {key: getattr(config, key) for key in same}
    if isinstance(vision, OpenClipVision) and not vision.has_stages:
        return _timm(vision.visual.trunk) if vision._is_timm else _open_clip(vision)
    tower = type(vision.encoder).__name__ if isinstance(vision, HFVision) else type(vision).__name__
    raise DoesNotFit(f"{tower} is not supported by BLIP-2's classes, which take {FITTING}")


def _open_clip(vision: OpenClipVision) -> tuple[dict[str, Tensor], dict]:
    visual, first = vision.visual, vision.visual.transformer.resblocks[0]
    if not isinstance(visual.ln_pre, nn.Identity) or not hasattr(first.mlp, "c_fc"):
        raise DoesNotFit(
            f"an open_clip ViT with a norm before its blocks (CLIP) is not supported by BLIP-2's classes, which take "
            f"{FITTING}"
        )
    state = {name: each for name, each in visual.state_dict().items() if not re.match(r"proj$|attn_pool|ln_post", name)}
    scale_layers(state, r"\.ls_([12])\.gamma$", ("attn.out_proj", "mlp.c_proj"))
    state["class_embedding"] = state["class_embedding"][None, None]
    state["positional_embedding"] = state["positional_embedding"][None]
    state["conv1.bias"] = state["conv1.weight"].new_zeros(vision.width)
    return renamed(state, CLIP_NAMES + _BLIP_NAMES), {
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": "quick_gelu" if vision.config.get("quick_gelu") else "gelu",
        "layer_norm_eps": first.ln_1.eps,
    }


def _timm(trunk: nn.Module) -> tuple[dict[str, Tensor], dict]:
    first = trunk.blocks[0]
    if getattr(trunk, "cls_token", None) is None or not hasattr(first.mlp, "fc1") or first.attn.qkv is None:
        raise DoesNotFit(
            f"timm's {type(trunk).__name__} without a class token or with gated layers is not supported by BLIP-2's "
            f"classes, which take {FITTING}"
        )
    after = re.compile(r"norm\.|fc_norm|head|attn_pool")  # after the last block; not used here
    state = {name: each for name, each in trunk.state_dict().items() if not after.match(name)}
    scale_layers(state, r"\.(?:ls|gamma_)([12])(?:\.gamma)?$", ("attn.proj", "mlp.fc2"))
    for name in [name for name in state if name.endswith(".q_bias")]:  # EVA's keys have no bias
        q, v = state.pop(name), state.pop(name.replace(".q_bias", ".v_bias"))
        state[name.replace(".q_bias", ".qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return renamed(state, TIMM_NAMES + _BLIP_NAMES), {
        "intermediate_size": first.mlp.fc1.out_features,
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": gelu_name(first.mlp.act),
        "layer_norm_eps": first.norm1.eps,
    }
