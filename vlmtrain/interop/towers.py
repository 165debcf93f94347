"""Vision encoders as Hugging Face classes: those of Hugging Face unchanged, those of open_clip with renamed tensors."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn

from ..model.vision import HFVision, OpenClipVision, VisionEncoder
from .fitting import DoesNotFit, filled, relative_difference, tolerance

CLIP_NAMES = (
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_", ".self_attn.qkv."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
TIMM_NAMES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
)


@torch.no_grad()
def as_hf_tower(vision: VisionEncoder) -> tuple[nn.Module, int]:
    """Convert `vision` to a Hugging Face model whose ``hidden_states[vision.layer]`` are the same features.

    Those of an encoder with a final norm are its ``last_hidden_state``.

    Returns the model, which shares unchanged tensors, and the number of tokens before its patches. Raises DoesNotFit
    for towers without a suitable class.
    """
    check_square(vision)
    if isinstance(vision, HFVision):
        model = _at_own_size(vision)
    elif isinstance(vision, OpenClipVision):
        model = _siglip(vision) if vision._is_timm else _clip(vision)
    else:
        raise DoesNotFit(f"{type(vision).__name__} has no counterpart in transformers")
    return model, _checked(vision, model)


def check_square(vision: VisionEncoder) -> None:
    """Raise DoesNotFit unless images and patches are square."""
    (height, width), patch = vision.image_size, vision.patch_size
    if height != width or patch[0] != patch[1]:
        raise DoesNotFit(
            f"vision.image_size={height}x{width} with patches of {patch[0]}x{patch[1]}: Hugging Face's classes require "
            "square images and patches"
        )


def _checked(vision: VisionEncoder, model: nn.Module) -> int:
    """The number of prefix tokens of `model`. Raises DoesNotFit unless its features equal those of `vision`."""
    parameter = next(vision.parameters())
    probe = torch.randn(1, 3, *vision.image_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    expected = vision.eval()(probe)
    out = model.eval()(probe, output_hidden_states=True)
    found = out.last_hidden_state if getattr(vision, "final_norm", False) else out.hidden_states[vision.layer]
    prefix = 0 if expected.prefix is None else expected.prefix.shape[1]
    if found.shape[1] == prefix + vision.grid[0] * vision.grid[1]:
        difference = relative_difference(found[:, prefix:], expected.patches.flatten(1, 2))
        if difference <= tolerance(parameter.dtype):
            return prefix
    raise DoesNotFit(
        f"Hugging Face's {type(model).__name__} with the weights of this image tower gives different features"
    )


def _at_own_size(vision: HFVision) -> nn.Module:
    """The encoder with its position table resized to the image size at which it is used."""
    encoder, size = vision.encoder, vision.image_size[0]
    if _side(encoder.config.image_size) == size:
        return encoder
    state = dict(encoder.state_dict())
    tables = [name for name in state if name.endswith(("position_embedding.weight", "position_embeddings"))]
    if len(tables) != 1 or not hasattr(getattr(encoder, "embeddings", None), "interpolate_pos_encoding"):
        raise DoesNotFit(
            f"vision.image_size={size} is not the encoder's own size ({_side(encoder.config.image_size)}), and the "
            f"position table of {type(encoder).__name__} cannot be resized to it"
        )
    table = state[tables[0]]
    nothing = torch.empty(1, 0, vision.width, dtype=table.dtype, device=table.device)
    positions = encoder.embeddings.interpolate_pos_encoding(nothing, size, size)
    state[tables[0]] = positions if table.dim() == 3 else positions[0]
    config = copy.deepcopy(encoder.config)
    config.image_size = size
    return filled(type(encoder), config, state, table.dtype)


def _side(size: int | list[int] | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]


def renamed(state: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Rename tensors to Hugging Face's names."""
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def _taken_apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split packed projections into query, key and value."""
    found = {}
    for name, tensor in state.items():
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                found[name.replace(".qkv.", f".{letter}_proj.")] = part
        else:
            found[name] = tensor
    return found


def gelu_name(activation: nn.Module) -> str:
    """Hugging Face's name for one of timm's GELU modules."""
    is_tanh = "tanh" in (type(activation).__name__.lower(), getattr(activation, "approximate", ""))
    return "gelu_pytorch_tanh" if is_tanh or type(activation).__name__ == "GELUTanh" else "gelu"


def scale_layers(state: dict[str, Tensor], pattern: str, layers: tuple[str, str]) -> None:
    """Multiply layer scales, matched by `pattern` with their number 1 or 2, into the last layers of the branches."""
    for name in [name for name in state if re.search(pattern, name)]:
        scale, found = state.pop(name), re.search(pattern, name)
        layer = f"{name[: found.start()]}.{layers[int(found[1]) - 1]}"
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * scale[:, None]
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * scale


def _clip(vision: OpenClipVision) -> nn.Module:
    """Convert open_clip's own ViT (OpenAI, LAION) to CLIPVisionModel."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    visual, state = vision.visual, dict(vision.visual.state_dict())
    first = visual.transformer.resblocks[0]
    scale_layers(state, r"\.ls_([12])\.gamma$", ("attn.out_proj", "mlp.c_proj"))
    # everything after the last block is unused
    state = {name: tensor for name, tensor in state.items() if name != "proj" and not name.startswith("attn_pool")}
    if visual.attn_pool is not None:
        state |= {"ln_post.weight": torch.ones(vision.width), "ln_post.bias": torch.zeros(vision.width)}
    config = CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=first.mlp.c_fc.out_features if hasattr(first.mlp, "c_fc") else 0,
        num_hidden_layers=vision.num_blocks,
        num_attention_heads=getattr(first.attn, "num_heads", 1),
        image_size=vision.image_size[0],
        patch_size=vision.patch_size[0],
        hidden_act="quick_gelu" if vision.config.get("quick_gelu") else "gelu",
        layer_norm_eps=first.ln_1.eps,
    )
    return filled(CLIPVisionModel, config, _taken_apart(renamed(state, CLIP_NAMES)), visual.conv1.weight.dtype)


def _siglip(vision: OpenClipVision) -> nn.Module:
    """Convert timm's ViT with SigLIP's architecture to SiglipVisionModel, without the unused head."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    trunk = vision.visual.trunk
    first = None if vision.has_stages else trunk.blocks[0]
    if first is None or not hasattr(first.mlp, "fc1") or not hasattr(first.attn, "num_heads"):
        raise DoesNotFit(f"timm's {type(trunk).__name__} has no counterpart in transformers")
    unused = ("attn_pool.", "head", "fc_norm.")
    state = {name: tensor for name, tensor in trunk.state_dict().items() if not name.startswith(unused)}
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"].flatten(0, 1)
    if "norm.weight" not in state:
        state |= {"norm.weight": torch.ones(vision.width), "norm.bias": torch.zeros(vision.width)}
    config = SiglipVisionConfig(
        hidden_size=vision.width,
        intermediate_size=first.mlp.fc1.out_features,
        num_hidden_layers=vision.num_blocks,
        num_attention_heads=first.attn.num_heads,
        image_size=vision.image_size[0],
        patch_size=vision.patch_size[0],
        hidden_act=gelu_name(first.mlp.act),
        layer_norm_eps=getattr(first.norm1, "eps", 1e-6),
        vision_use_head=False,
    )
    state = _taken_apart(renamed(state, TIMM_NAMES))
    return filled(SiglipVisionModel, config, state, trunk.patch_embed.proj.weight.dtype)
