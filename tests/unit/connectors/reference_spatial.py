"""References of convolving, sampling, packing, aggregating and scanning connectors.

Each function builds a connector with the weights of its reference, and the reference: grid -> (connector, reference).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from reference_tools import C, D, hf, hf_config, published, rescaled
from torch import nn

from vlmtrain.connectors import build_connector


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
    # Honeybee's checkpoints use the tensor names of an older release of the layer.
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
                # Bilinear downsampling by 2 without aligned corners is the mean of the four patches.
                coarse = f.patches[:, top : top + 2, left : left + 2].mean((1, 2)).unsqueeze(1)
                query = reference.ln_q_1(reference.q_proj_1(coarse))
                key = reference.ln_k_1(reference.k_proj_1(region))
                value = reference.ln_v_1(reference.v_proj_1(region))
                tokens.append(reference.clip_attn(query, key, value)[0])
        return reference.mlp(torch.cat(tokens, dim=1))

    return connector, pack


def spatial_aggregator(grid, finer):
    """One query at a time, with loops over encoders, patches of its windows, and heads.

    finer: sides of each encoder's grid, as multiples of `grid`.
    """
    side, width, heads = 2, 16, 4
    grids = [(grid[0] * factor, grid[1] * factor) for factor in finer]
    widths = (C, 12, 20)[: len(finer)]
    windows = [(height // side, breadth // side) for height, breadth in grids]

    def normed():
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))

    def sampling_layer():
        layer = nn.Module()
        layer.proj_context = nn.Linear(width, width, bias=False)
        layer.proj_in = nn.Linear(2 * width, width, bias=False)
        layer.proj_out = nn.Module()
        layer.proj_out.linear_1 = nn.Linear(width, width, bias=False)
        layer.proj_out.linear_2 = nn.Linear(width, width, bias=False)
        layer.norm = nn.LayerNorm(width)
        layer.cross_attn = nn.Module()
        layer.cross_attn.q_proj = normed()
        layer.cross_attn.o_proj = nn.Linear(width, width, bias=False)
        for i, (height, breadth) in enumerate(windows):
            layer.cross_attn.add_module(f"k_proj_{i}", normed())
            layer.cross_attn.add_module(f"v_proj_{i}", normed())
            if height * breadth > 1:
                layer.register_parameter(f"pos_embed_{i}", nn.Parameter(torch.empty(height * breadth, width)))
        return layer

    reference = nn.Module()
    reference.vision_query = nn.Parameter(torch.empty(1, width))
    reference.mm_projector = nn.Sequential(nn.Linear(width, D), nn.GELU(), nn.Linear(D, D))
    for i, in_dim in enumerate(widths):
        layers = nn.Linear(in_dim, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        reference.add_module(f"mm_projector_aux_{i}", nn.Sequential(*layers))
    reference.vision_sampler_0 = nn.Module()
    reference.vision_sampler_0.layers = nn.ModuleList(sampling_layer() for _ in range(2))
    rescaled(reference)
    options = dict(grid=side, hidden_size=width, depth=2, num_heads=heads)
    one = len(finer) == 1
    in_dim, input_grid = (C, grid) if one else (widths, tuple(grids))
    connector = build_connector("spatial_aggregator", in_dim, D, input_grid=input_grid, **options)
    published(connector, "model.", reference)

    def attend(layer, x, maps, row, column):
        attention, keys, values = layer.cross_attn, [], []
        for i, (height, breadth) in enumerate(windows):
            for down in range(height):
                for right in range(breadth):
                    patch = maps[i][:, row * height + down, column * breadth + right]
                    if height * breadth > 1:
                        patch = patch + getattr(layer, f"pos_embed_{i}")[down * breadth + right]
                    keys.append(getattr(attention, f"k_proj_{i}")(patch))
                    values.append(getattr(attention, f"v_proj_{i}")(patch))
        query, mixed = attention.q_proj(x), []
        for head in torch.arange(width).chunk(heads):
            scores = [(query[:, head] * key[:, head]).sum(1) / len(head) ** 0.5 for key in keys]
            weights = torch.stack(scores, dim=1).softmax(1)
            mixed.append(sum(weights[:, j, None] * value[:, head] for j, value in enumerate(values)))
        return attention.o_proj(torch.cat(mixed, dim=1))

    def aggregate(features):
        encoders = (features,) if one else features
        maps = [getattr(reference, f"mm_projector_aux_{i}")(f.patches) for i, f in enumerate(encoders)]
        mean = maps[0].mean((1, 2))
        tokens = []
        for row in range(side):
            for column in range(side):
                query = reference.vision_query.expand(len(mean), -1)
                for layer in reference.vision_sampler_0.layers:
                    x = layer.proj_in(torch.cat([query, layer.proj_context(mean)], dim=1))
                    x = layer.norm(x + attend(layer, x, maps, row, column))
                    query = query + layer.proj_out.linear_2(F.gelu(layer.proj_out.linear_1(x)))
                tokens.append(reference.mm_projector(query))
        return torch.stack(tokens, dim=1)

    return connector, aggregate


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
