"""References of token-wise, pooling and merging connectors.

Each function builds a connector with the weights of its reference, and the reference: grid -> (connector, reference).
"""

from __future__ import annotations

import torch
from reference_tools import C, D, block_order, hf, hf_config, published, rescaled
from torch import Tensor, nn
from transformers.models.molmo2.video_processing_molmo2 import arange_for_pooling as molmo2_windows

from vlmtrain.connectors import build_connector


def linear(grid):
    reference = rescaled(nn.Linear(C, D))
    connector = published(build_connector("linear", C, D), "model.mm_projector.", reference)
    return (
        connector,
        lambda f: torch.einsum("bhwc,dc->bhwd", f.patches, reference.weight).flatten(1, 2) + reference.bias,
    )


def mlp(grid):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(hidden_size=C, num_attention_heads=4)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(hidden_size=D, num_attention_heads=4))
    reference = rescaled(hf("llava", "LlavaMultiModalProjector")(config))
    connector = published(build_connector("mlp", C, D), "model.multi_modal_projector.", reference)
    return connector, lambda f: reference(f.patches.flatten(1, 2))


def identity(grid, prefix):
    reference = rescaled(nn.Linear(C, D))
    connector = build_connector("identity", C, D, prefix=prefix)
    connector.proj.load_state_dict(reference.state_dict())

    def passed_on(f):
        patches = [f.patches[:, row, column] for row in range(grid[0]) for column in range(grid[1])]
        return torch.stack([reference(x) for x in [*(f.prefix[:, i] for i in range(prefix)), *patches]], dim=1)

    return connector, passed_on


def avgpool(grid, window):
    reference = rescaled(nn.Linear(C, D))
    connector = build_connector("avgpool", C, D, window=window)
    connector.load_published({f"proj.{name}": tensor for name, tensor in reference.state_dict().items()})

    def windows(f):
        x = f.patches
        tops, lefts = range(0, x.shape[1], window), range(0, x.shape[2], window)
        means = [x[:, top : top + window, left : left + window].mean((1, 2)) for top in tops for left in lefts]
        return reference(torch.stack(means, dim=1))

    return connector, windows


def attentional_pool(grid, window):
    """The windows, too, are those of the published processor, which pads both sides of a ragged grid."""
    config = hf_config(
        "molmo2",
        "Molmo2AdapterConfig",
        hidden_size=C,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        intermediate_size=32,
        text_hidden_size=D,
        vision_feature_layer=[24, 18],
    )
    reference = rescaled(hf("molmo2", "Molmo2Adapter")(config))
    connector = build_connector("attentional_pool", C, D, window=window, num_heads=4, intermediate_size=32)
    published(connector, "model.multi_modal_projector.", reference)
    numbered = torch.arange(grid[0] * grid[1]).unflatten(0, grid)
    indices = molmo2_windows(numbered, window, window)[0]

    def adapter(f):
        x = torch.cat([f.levels[1], f.levels[0]], dim=-1).flatten(1, 2)  # layer 24, then 18
        return torch.stack([reference(one[None], indices).last_hidden_state for one in x])

    return connector, adapter


# --- mergers ------------------------------------------------------------------------------------------------


def qwen2_merger(grid, name, model, reference_name):
    reference = rescaled(hf(model, reference_name)(D, C, 2))
    connector = published(build_connector(name, C, D), "visual.merger.", reference)
    return connector, lambda f: reference(block_order(f.patches)).unflatten(0, (len(f.patches), -1))


def qwen3_merger(grid, levels):
    config = hf_config("qwen3_vl", "Qwen3VLVisionConfig", hidden_size=C, num_heads=4, out_hidden_size=D)
    make = hf("qwen3_vl", "Qwen3VLVisionPatchMerger")
    reference = nn.Module()
    reference.merger = make(config)
    reference.deepstack_merger_list = nn.ModuleList(make(config, use_postshuffle_norm=True) for _ in range(levels))
    rescaled(reference)
    connector = published(build_connector("qwen3_vl_merger", C, D, levels=levels), "model.visual.", reference)

    def merge(f):
        mergers = [reference.merger, *reference.deepstack_merger_list]
        layers = [f.patches, *f.levels]
        outputs = [merger(block_order(x).flatten(0, 1)) for merger, x in zip(mergers, layers, strict=True)]
        return torch.cat(outputs, dim=-1).unflatten(0, (len(f.patches), -1))

    return connector, merge


def hunyuan_merger(grid):
    config = hf_config("hunyuan_vl", "HunYuanVLVisionConfig", hidden_size=C, text_hidden_size=D)
    reference = rescaled(hf("hunyuan_vl", "HunYuanVLVisionPatchMerger")(config))
    connector = published(build_connector("hunyuan_merger", C, D), "model.vision_tower.patch_merger.", reference)
    return connector, lambda f: reference(f.patches.flatten(1, 2), tuple(f.patches.shape[1:3]))


def shuffle_loop(x: Tensor) -> Tensor:
    """Concatenate 2x2 patches along the channels, token by token."""
    _, height, width, _ = x.shape
    tokens = [
        torch.cat([x[:, top, left], x[:, top, left + 1], x[:, top + 1, left], x[:, top + 1, left + 1]], dim=-1)
        for top in range(0, height, 2)
        for left in range(0, width, 2)
    ]
    return torch.stack(tokens, dim=1)


def idefics3(grid):
    from types import SimpleNamespace as Config

    config = Config(scale_factor=2, vision_config=Config(hidden_size=C), text_config=Config(hidden_size=D))
    reference = rescaled(hf("idefics3", "Idefics3Connector")(config))
    connector = published(build_connector("pixel_shuffle", C, D), "model.connector.", reference)
    if grid[0] == grid[1]:
        return connector, lambda f: reference(f.patches.flatten(1, 2))
    # The reference takes the square root of the number of patches, so a loop is used for other grids.
    return connector, lambda f: reference.modality_projection(shuffle_loop(f.patches))


def internvl(grid):
    from types import SimpleNamespace as Config

    config = Config(
        vision_config=Config(hidden_size=C),
        text_config=Config(hidden_size=D),
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
    )
    reference = rescaled(hf("internvl", "InternVLMultiModalProjector")(config))
    connector = build_connector("pixel_shuffle", C, D, head="internvl")
    published(connector, "model.multi_modal_projector.", reference)
    shuffle = hf("internvl", "InternVLModel").pixel_shuffle
    return connector, lambda f: reference(shuffle(None, f.patches, 0.5).flatten(1, 2))
