"""Each connector beside its reference: the cases that the tests check and the connector table reports.

A case builds the reference with weights rescaled to order one (at their published initialisation some outputs are
so small that anything would pass), hands its state dict to `load_published`, and compares outputs and the gradients
of all inputs. Where no package has the reference, it is derived again here, slowly and plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmtrain.connectors import Connector, VisionFeatures, build_connector

C, D = 16, 24  # widths of the tiny encoder and language model

Reference = Callable[[VisionFeatures], Tensor]


class Case(NamedTuple):
    """build(grid) -> (connector with the reference's weights, reference); `widths`: one an encoder."""

    name: str
    reference: str
    build: Callable[[tuple[int, int]], tuple[Connector, Reference]]
    grids: tuple[tuple[int, int], ...]
    prefix: bool = False
    widths: tuple[int, ...] = (C,)
    label: str = ""


def measure(case: Case, grid: tuple[int, int]) -> tuple[float, float]:
    """Largest error of the output, and of the gradients of the inputs, relative to their largest value."""
    torch.manual_seed(0)
    connector, reference = case.build(grid)
    connector.eval()
    results = []
    for function in (connector, reference):
        torch.manual_seed(1)
        features, leaves = inputs(case, connector, grid)
        output = joined(function(features))
        output.backward(torch.randn_like(output))
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        results.append((output.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    (output, gradient), (expected, expected_gradient) = results
    assert output.shape == expected.shape, (output.shape, expected.shape)
    assert expected.abs().mean() > 1e-2, "the reference's output is too small to compare"
    return relative_error(output, expected), relative_error(gradient, expected_gradient)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def inputs(case: Case, connector: Connector, grid: tuple[int, int]):
    """Random features of the case's encoders, and all their tensors."""
    leaves: list[Tensor] = []

    def leaf(*shape: int) -> Tensor:
        leaves.append(torch.randn(shape, requires_grad=True))
        return leaves[-1]

    encoders = tuple(
        VisionFeatures(
            leaf(2, *grid, width),
            leaf(2, 1, width) if case.prefix else None,
            tuple(leaf(2, *grid, width) for _ in range(connector.num_levels)),
        )
        for width in case.widths
    )
    return (encoders if len(encoders) > 1 else encoders[0]), leaves


def joined(output: Tensor | tuple[Tensor, tuple[Tensor, ...]]) -> Tensor:
    """Tokens, with those for deeper layers beside them."""
    return output if isinstance(output, Tensor) else torch.cat([output[0], *output[1]], dim=-1)


@torch.no_grad()
def rescaled(module: nn.Module) -> nn.Module:
    """Random weights that keep activations at order one."""
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
        else:
            weight.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
    return module.eval()


def hf(model: str, name: str) -> type:
    return getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)


def hf_config(model: str, name: str, **options):
    config = getattr(import_module(f"transformers.models.{model}.configuration_{model}"), name)(**options)
    config._attn_implementation = "eager"
    return config


def published(connector: Connector, prefix: str, module: nn.Module, **more: Tensor) -> Connector:
    """Load the reference's own state dict, under a prefix, and further tensors."""
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    connector.load_published({**state, **more})
    return connector


def block_order(x: Tensor, side: int = 2) -> Tensor:
    """Raster (B, H, W, C) -> (B, H*W, C) in the order of Qwen's processor: square by square."""
    _, height, width, _ = x.shape
    rows = [
        x[:, top + i, left + j]
        for top in range(0, height, side)
        for left in range(0, width, side)
        for i in range(side)
        for j in range(side)
    ]
    return torch.stack(rows, dim=1)


# --- token-wise and pooling ---------------------------------------------------------------------------------


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


def window_indices(height: int, width: int, window: int) -> Tensor:
    """Raster indices of the patches of each window, -1 where a window reaches over the edge."""
    rows = [
        [
            (top + i) * width + left + j if top + i < height and left + j < width else -1
            for i in range(window)
            for j in range(window)
        ]
        for top in range(0, height, window)
        for left in range(0, width, window)
    ]
    return torch.tensor(rows)


def attentional_pool(grid, window):
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
    indices = window_indices(*grid, window)

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
    """2x2 patches side by side in channels, one token after the other."""
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
    # The reference takes the square root of the number of patches, so a loop stands in.
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


# --- queries ------------------------------------------------------------------------------------------------


def sincos_table(dim: int, side: int) -> Tensor:
    """Entry by entry: sines, then cosines, of the column; then of the row."""
    table = torch.zeros(side * side, dim)
    quarter = dim // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                for half, position in enumerate((column, row)):
                    angle = torch.tensor(position / 10000 ** (i / quarter), dtype=torch.float64)
                    table[row * side + column, half * 2 * quarter + i] = angle.sin()
                    table[row * side + column, half * 2 * quarter + quarter + i] = angle.cos()
    return table


def qwen_vl_plain(grid):
    reference = nn.Module()
    reference.query = nn.Parameter(torch.empty(16, D))
    reference.kv_proj = nn.Linear(C, D, bias=False)
    reference.attn = nn.MultiheadAttention(D, 2, batch_first=True)
    reference.ln_q, reference.ln_kv = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
    ln_post, proj = rescaled(nn.LayerNorm(D, eps=1e-6)), torch.randn(D, D) * D**-0.5
    rescaled(reference)
    table = sincos_table(D, 4)
    more = {"visual.ln_post.weight": ln_post.weight, "visual.ln_post.bias": ln_post.bias, "visual.proj": proj}
    connector = build_connector("qwen_vl_resampler", C, D, grid=4, num_heads=2)
    published(connector, "visual.attn_pool.", reference, **more, **{"visual.attn_pool.pos_embed": table})
    image = table.reshape(4, 4, D).permute(2, 0, 1)[None]
    if grid != (4, 4):
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    positions = image[0].flatten(1).T

    def resample(f):
        x = reference.ln_kv(reference.kv_proj(f.patches.flatten(1, 2)))
        q = (reference.ln_q(reference.query) + table).expand(len(x), -1, -1)
        return ln_post(reference.attn(q, x + positions, x)[0]) @ proj

    return connector, resample


def qwen_vl_open_clip(grid):
    """Positions zeroed and equal widths: what is left is open_clip's pooler."""
    from open_clip.transformer import AttentionalPooler

    reference = AttentionalPooler(C, C, n_head=4, n_queries=16, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    rescaled(reference)
    ln_post, proj = rescaled(nn.LayerNorm(C, eps=1e-6)), torch.randn(C, C) * C**-0.5
    state = {name.replace("ln_k.", "ln_kv."): tensor for name, tensor in reference.state_dict().items()}
    state = {f"attn_pool.{name}": tensor for name, tensor in state.items()}
    state |= {"attn_pool.pos_embed": torch.zeros(16, C), "proj": proj}
    state |= {f"ln_post.{name}": tensor for name, tensor in ln_post.state_dict().items()}
    connector = build_connector("qwen_vl_resampler", C, C, grid=4, num_heads=4)
    connector.load_published(state)
    return connector, lambda f: ln_post(reference(f.patches.flatten(1, 2))) @ proj


QFORMER = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64)
TINY_QFORMER = dict(hidden_size=32, num_heads=4, intermediate_size=64, depth=4)


def qformer_reference(width: int, **options) -> nn.Module:
    options = dict(vocab_size=50, num_hidden_layers=4, encoder_hidden_size=width, **QFORMER) | options
    config = hf_config("blip_2", "Blip2QFormerConfig", **options)
    reference = nn.Module()
    reference.qformer = hf("blip_2", "Blip2QFormerModel")(config)
    return reference


def tokens_of(f: VisionFeatures) -> Tensor:
    return torch.cat([f.prefix, f.patches.flatten(1, 2)], dim=1)


def qformer(grid):
    reference = qformer_reference(C)
    reference.query_tokens = nn.Parameter(torch.empty(1, 5, 32))
    reference.language_projection = nn.Linear(32, D)
    rescaled(reference)
    connector = published(build_connector("qformer", C, D, num_queries=5, **TINY_QFORMER), "", reference)

    def query(f):
        x = tokens_of(f)
        queries = reference.query_tokens.expand(len(x), -1, -1)
        states = reference.qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
        return reference.language_projection(states)

    return connector, query


def instructblip(grid):
    config = hf_config(
        "instructblip",
        "InstructBlipQFormerConfig",
        vocab_size=50,
        num_hidden_layers=4,
        encoder_hidden_size=C,
        **QFORMER,
    )
    reference = nn.Module()
    reference.qformer = hf("instructblip", "InstructBlipQFormerModel")(config)
    reference.query_tokens = nn.Parameter(torch.empty(1, 5, 32))
    reference.language_projection = nn.Linear(32, D)
    rescaled(reference)
    connector = build_connector("qformer", C, D, num_queries=5, text_vocab=50, **TINY_QFORMER)
    published(connector, "model.", reference)
    ids = torch.randint(50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])

    class Instructed(nn.Module):
        num_levels = 0

        def forward(self, f):
            return connector.eval()(f, ids, mask)

    def query(f):
        x = tokens_of(f)
        states = reference.qformer(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(2, 5, dtype=torch.long), mask], dim=1),
            query_embeds=reference.query_tokens.expand(len(x), -1, -1),
            encoder_hidden_states=x,
        ).last_hidden_state
        return reference.language_projection(states[:, :5])

    return Instructed(), query


def meq_former(grid):
    reference = qformer_reference(20)
    reference.query_tokens = nn.Parameter(torch.empty(1, 64, 32))
    reference.proj = nn.Linear(32, D)
    reference.projections = nn.ModuleList([nn.Linear(C, 20), nn.Linear(12, 20)])
    rescaled(reference)
    connector = build_connector("meq_former", (C, 12), D, hidden_dim=20, **TINY_QFORMER)
    # BRAVE publishes no weights: the Q-Former's arrive by way of a plain one.
    plain = build_connector("qformer", 20, D, num_queries=64, **TINY_QFORMER)
    parts = nn.ModuleDict({"qformer": reference.qformer, "language_projection": reference.proj})
    published(plain, "", parts, query_tokens=reference.query_tokens)
    projections = {f"projections.{name}": tensor for name, tensor in reference.projections.state_dict().items()}
    connector.load_published({**plain.state_dict(), **projections})

    def query(features):
        parts = [project(tokens_of(f)) for project, f in zip(reference.projections, features, strict=True)]
        states = reference.qformer(
            query_embeds=reference.query_tokens.expand(2, -1, -1), encoder_hidden_states=torch.cat(parts, dim=1)
        ).last_hidden_state
        return reference.proj(states)

    return connector, query


def perceiver(grid, out_dim):
    attention, feed_forward = (hf("evolla", f"Evolla{name}") for name in ("SequenceCompressorAttention", "FeedForward"))
    reference = nn.Module()
    reference.latents = nn.Parameter(torch.empty(5, C))
    reference.layers = nn.ModuleList(nn.ModuleList([attention(C, 8, 3), feed_forward(C)]) for _ in range(2))
    reference.norm = nn.LayerNorm(C)
    rescaled(reference)
    # open_flamingo's feed-forward is a plain sequence: norm, linear, activation, linear.
    flamingo = {"1.norm.": "1.0.", "1.fc1.": "1.1.", "1.fc2.": "1.3."}
    state = {}
    for name, tensor in reference.state_dict().items():
        for ours, theirs in flamingo.items():
            name = name.replace(ours, theirs)
        state[f"perceiver.{name}"] = tensor
    options = dict(num_queries=5, depth=2, num_heads=3, head_dim=8)
    connector = build_connector("perceiver_resampler", C, out_dim, **options)
    connector.load_published(state)

    def resample(f):
        x = f.patches.flatten(1, 2)
        latents = reference.latents.expand(len(x), -1, -1)
        everything = torch.ones(len(x), x.shape[1] + latents.shape[1])
        for attend, feed in reference.layers:
            latents = attend(x, latents, everything) + latents
            latents = feed(latents) + latents
        return connector.proj(reference.norm(latents))

    return connector, resample


# --- abstractors and downsampling ---------------------------------------------------------------------------


def c_abstractor(grid, hidden_size):
    from timm.layers import LayerNorm2d
    from timm.models.regnet import RegStage

    stage = partial(RegStage, 2, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
    reference = nn.Module()
    reference.pos_emb = nn.Parameter(torch.empty(1, grid[0] * grid[1], C))
    reference.net = nn.Sequential(
        stage(in_chs=C, out_chs=hidden_size),
        nn.AdaptiveAvgPool2d((3, 3)),
        stage(in_chs=hidden_size, out_chs=hidden_size),
    )
    reference.readout = nn.Sequential(nn.Linear(hidden_size, D), nn.SiLU(), nn.Linear(D, D))
    rescaled(reference)
    connector = build_connector("c_abstractor", C, D, input_grid=grid, grid=3, hidden_size=hidden_size, depth=2)
    published(connector, "abstractor.", reference)

    def abstract(f):
        x = f.patches.flatten(1, 2) + reference.pos_emb
        x = reference.net(x.transpose(1, 2).unflatten(2, grid))
        return reference.readout(x.flatten(2).transpose(1, 2))

    return connector, abstract


def d_abstractor(grid, hidden_size):
    config = hf_config(
        "deformable_detr",
        "DeformableDetrConfig",
        d_model=hidden_size,
        decoder_attention_heads=4,
        decoder_ffn_dim=40,
        num_feature_levels=1,
        disable_custom_kernels=True,
    )
    layer = hf("deformable_detr", "DeformableDetrDecoderLayer")
    reference = nn.Module()
    reference.layers = nn.ModuleList(layer(config) for _ in range(2))
    reference.input_proj = nn.ModuleList([nn.Identity() if hidden_size == C else nn.Linear(C, hidden_size)])
    reference.v_pos_emb = nn.Parameter(torch.empty(1, grid[0] * grid[1], hidden_size))
    reference.query_position_embeddings = nn.Embedding(9, hidden_size)
    reference.output_proj = nn.Linear(hidden_size, D)
    rescaled(reference)
    reference.reference_points = nn.Parameter(torch.rand(1, 9, 2))
    # Honeybee's checkpoints hold the names of an older release of the layer.
    old = {".o_proj.": ".out_proj.", ".mlp.fc": ".fc"}
    state = {}
    for name, tensor in reference.state_dict().items():
        for new_part, old_part in old.items():
            name = name.replace(new_part, old_part)
        state[f"abstractor.{name}"] = tensor
    connector = build_connector(
        "d_abstractor", C, D, input_grid=grid, grid=3, hidden_size=hidden_size, depth=2, num_heads=4,
        intermediate_size=40,
    )  # fmt: skip
    connector.load_published(state)

    def abstract(f):
        x = reference.input_proj[0](f.patches.flatten(1, 2)) + reference.v_pos_emb
        pooled = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, grid), 3).flatten(2).transpose(1, 2)
        states = reference.query_position_embeddings.weight.expand(len(x), -1, -1)
        for decode in reference.layers:
            states = decode(
                states,
                object_queries_position_embeddings=pooled,
                reference_points=reference.reference_points.expand(len(x), -1, -1)[:, :, None],
                spatial_shapes=torch.tensor([grid]),
                spatial_shapes_list=[grid],
                level_start_index=torch.tensor([0]),
                encoder_hidden_states=x,
            )
        return reference.output_proj(states)

    return connector, abstract


def ldp(grid):
    from timm.layers.norm_act import LayerNormAct2d
    from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
    from torchvision.ops.misc import SqueezeExcitation

    norm = partial(LayerNormAct2d, act_layer=None)
    gate = partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid)

    def block(stride):
        return InvertedResidual(InvertedResidualConfig(D, 3, D, D, True, "HS", stride, 1, 1), norm, gate)

    reference = nn.Module()
    reference.mlp = nn.Sequential(nn.Identity(), nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))
    reference.mb_block = nn.Sequential(nn.Identity(), block(1), block(2))
    rescaled(reference)
    connector = published(build_connector("ldp", C, D), "mm_projector.model.", reference)

    def project(f):
        x = reference.mlp(f.patches).permute(0, 3, 1, 2)
        return reference.mb_block(x).flatten(2).transpose(1, 2)

    return connector, project


def ldpv2(grid):
    reference = nn.Module()
    reference.mlp, reference.peg = nn.Module(), nn.Module()
    reference.mlp.mlp = nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))
    reference.peg.peg = nn.Sequential(nn.Conv2d(D, D, 3, padding=1, groups=D))
    rescaled(reference)
    connector = published(build_connector("ldpv2", C, D, grid=3), "mm_projector.", reference)
    conv = reference.peg.peg[0]

    def project(f):
        x = reference.mlp.mlp(f.patches)
        height, width = grid
        cells = {}
        for i in range(3):
            for j in range(3):
                rows = slice(i * height // 3, -(-(i + 1) * height // 3))
                columns = slice(j * width // 3, -(-(j + 1) * width // 3))
                cells[i, j] = x[:, rows, columns].mean((1, 2))
        tokens = []
        for i in range(3):
            for j in range(3):
                token = cells[i, j] + conv.bias
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if (i + di, j + dj) in cells:
                            token = token + conv.weight[:, 0, di + 1, dj + 1] * cells[i + di, j + dj]
                tokens.append(token)
        return torch.stack(tokens, dim=1)

    return connector, project


def token_packer(grid):
    def two(*widths):
        return nn.Sequential(nn.Linear(*widths), nn.GELU(), nn.Linear(widths[1], widths[1]))

    width = 32
    reference = nn.Module()
    reference.q_proj_1 = nn.Linear(C, width, bias=False)
    reference.k_proj_1, reference.v_proj_1 = two(4 * C, width), two(4 * C, width)
    reference.ln_q_1, reference.ln_k_1, reference.ln_v_1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
    reference.clip_attn = nn.MultiheadAttention(width, 4, batch_first=True)
    reference.mlp = two(width, D)
    rescaled(reference)
    connector = build_connector("token_packer", C, D, hidden_size=width, num_heads=4)
    published(connector, "model.mm_projector.", reference)

    def pack(f):
        tokens = []
        levels = torch.cat(f.levels, dim=-1)
        for top in range(0, grid[0], 2):
            for left in range(0, grid[1], 2):
                region = levels[:, top : top + 2, left : left + 2].flatten(1, 2)
                # Halving bilinearly without aligned corners is the mean of the four patches.
                coarse = f.patches[:, top : top + 2, left : left + 2].mean((1, 2)).unsqueeze(1)
                query = reference.ln_q_1(reference.q_proj_1(coarse))
                key = reference.ln_k_1(reference.k_proj_1(region))
                value = reference.ln_v_1(reference.v_proj_1(region))
                tokens.append(reference.clip_attn(query, key, value)[0])
        return reference.mlp(torch.cat(tokens, dim=1))

    return connector, pack


# --- scans --------------------------------------------------------------------------------------------------


def vss(grid, head, scan):
    dim = D if head == "l2" else C
    reference = nn.Module()
    mixer = hf("mamba", "MambaMixer")(hf_config("mamba", "MambaConfig", hidden_size=dim, num_hidden_layers=1), 0)
    decay = mixer.A_log.detach().clone()
    reference.proj = nn.Linear(C, D) if head == "l2" else None
    reference.mixer = mixer
    reference.norm = nn.LayerNorm(dim)
    reference.head = nn.Linear(D, D) if head == "l2" else nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))
    rescaled(reference)
    mixer.A_log.data = decay + 0.3 * torch.randn_like(decay)
    connector = published(build_connector("vss", C, D, head=head, scan=scan), "", reference)
    height, width = grid
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    paths = [rows, rows[::-1]] + ([columns, columns[::-1]] if scan == "cross" else [])

    def scanned(x):
        total = [[0.0] * width for _ in range(height)]
        for path in paths:
            y = mixer(torch.stack([x[:, i, j] for i, j in path], dim=1))
            for step, (i, j) in enumerate(path):
                total[i][j] = total[i][j] + y[:, step]
        return torch.stack([torch.stack(row, dim=1) for row in total], dim=1)

    def project(f):
        if head == "mlp":
            return reference.head(reference.norm(scanned(f.patches) + f.patches)).flatten(1, 2)
        x = reference.proj(f.patches)
        return reference.head(reference.norm(scanned(F.gelu(x)) + x)).flatten(1, 2)

    return connector, project


SQUARE_AND_NOT = ((4, 4), (4, 6))
PLAIN = "plain re-derivation"
QWEN25 = ("qwen2_5_vl_merger", "qwen2_5_vl", "Qwen2_5_VLPatchMerger")

CASES = [
    Case("linear", PLAIN, linear, ((4, 4), (3, 5))),
    Case("mlp", "HF LlavaMultiModalProjector", mlp, ((4, 4), (3, 5))),
    Case("avgpool", "loop over windows", partial(avgpool, window=2), ((4, 4), (27, 27), (5, 3)), label="w2"),
    Case("avgpool", "loop over windows", partial(avgpool, window=3), ((7, 7), (6, 4)), label="w3"),
    Case("attentional_pool", "HF Molmo2Adapter", partial(attentional_pool, window=2), ((4, 4), (3, 5)), label="w2"),
    Case("attentional_pool", "HF Molmo2Adapter", partial(attentional_pool, window=3), ((6, 6), (4, 7)), label="w3"),
    Case("qwen_vl_resampler", "open_clip AttentionalPooler", qwen_vl_open_clip, SQUARE_AND_NOT, label="open_clip"),
    Case("qwen_vl_resampler", PLAIN, qwen_vl_plain, ((4, 4), (6, 6), (3, 5)), label="positions"),
    Case(
        "qwen2_vl_merger",
        "HF PatchMerger",
        partial(qwen2_merger, name="qwen2_vl_merger", model="qwen2_vl", reference_name="PatchMerger"),
        SQUARE_AND_NOT,
    ),
    Case(
        "qwen2_5_vl_merger",
        "HF Qwen2_5_VLPatchMerger",
        partial(qwen2_merger, name=QWEN25[0], model=QWEN25[1], reference_name=QWEN25[2]),
        SQUARE_AND_NOT,
    ),
    Case("qwen3_vl_merger", "HF Qwen3VLVisionPatchMerger", partial(qwen3_merger, levels=0), SQUARE_AND_NOT),
    Case(
        "qwen3_vl_merger",
        "HF Qwen3VLVisionPatchMerger",
        partial(qwen3_merger, levels=3),
        SQUARE_AND_NOT,
        label="deepstack",
    ),
    Case("hunyuan_merger", "HF HunYuanVLVisionPatchMerger", hunyuan_merger, ((4, 4), (4, 6), (5, 7))),
    Case("qformer", "HF Blip2QFormerModel", qformer, ((4, 4), (3, 5)), prefix=True),
    Case("qformer", "HF InstructBlipQFormerModel", instructblip, ((4, 4), (3, 5)), prefix=True, label="instruction"),
    Case(
        "perceiver_resampler",
        "HF Evolla compressor",
        partial(perceiver, out_dim=C),
        ((4, 4), (3, 5)),
        label="published width",
    ),
    Case("perceiver_resampler", "HF Evolla compressor", partial(perceiver, out_dim=D), ((4, 4), (3, 5))),
    Case("c_abstractor", "timm RegStage", partial(c_abstractor, hidden_size=20), ((6, 6), (4, 6))),
    Case("c_abstractor", "timm RegStage", partial(c_abstractor, hidden_size=C), ((6, 6), (4, 6)), label="same width"),
    Case("d_abstractor", "HF DeformableDetrDecoderLayer", partial(d_abstractor, hidden_size=32), ((6, 6), (6, 4))),
    Case(
        "d_abstractor",
        "HF DeformableDetrDecoderLayer",
        partial(d_abstractor, hidden_size=C),
        ((6, 6), (6, 4)),
        label="same width",
    ),
    Case("ldp", "torchvision InvertedResidual, timm LayerNormAct2d", ldp, ((4, 4), (5, 5), (3, 6))),
    Case("ldpv2", PLAIN, ldpv2, ((6, 6), (5, 4), (2, 2))),
    Case("meq_former", "HF Blip2QFormerModel", meq_former, ((4, 4), (3, 5)), prefix=True, widths=(C, 12)),
    *(
        Case("vss", "HF MambaMixer", partial(vss, head=head, scan=scan), ((4, 4), (3, 5)), label=f"{head} {scan}")
        for head in ("l2", "mlp")
        for scan in ("bidirectional", "cross")
    ),
    Case("pixel_shuffle", "HF Idefics3Connector", idefics3, SQUARE_AND_NOT),
    Case("pixel_shuffle", "HF InternVLModel.pixel_shuffle", internvl, SQUARE_AND_NOT, label="internvl"),
    Case("token_packer", PLAIN, token_packer, SQUARE_AND_NOT),
]
