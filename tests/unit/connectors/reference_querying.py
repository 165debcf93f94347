"""References of connectors with learned queries.

Each function builds a connector with the weights of its reference, and the reference: grid -> (connector, reference).
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from reference_tools import C, D, hf, hf_config, published, rescaled
from torch import Tensor, nn

from vlmtrain.connectors import VisionFeatures, build_connector


def sincos_table(dim: int, side: int) -> Tensor:
    """Computed entry by entry: sines, then cosines, of the column; then of the row."""
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
    """With zero positions and equal widths, what remains is open_clip's pooler."""
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
    # BRAVE publishes no weights, so the weights of a plain Q-Former are loaded.
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
    # open_flamingo's feed-forward is an nn.Sequential: norm, linear, activation, linear.
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


def idefics(grid, out_dim, qk_norm):
    perceiver = {"qk_layer_norms_perceiver": qk_norm}
    config = hf_config("idefics", "IdeficsConfig", vision_config={"embed_dim": C}, perceiver_config=perceiver)
    resampler = import_module("transformers.models.idefics.perceiver").IdeficsPerceiverResampler
    reference = rescaled(resampler(config, C, 2, 3, 8, 5))
    options = dict(num_queries=5, depth=2, num_heads=3, head_dim=8, qk_norm=qk_norm)
    connector = published(
        build_connector("idefics_resampler", C, out_dim, **options), "model.perceiver_resampler.", reference
    )
    return connector, lambda f: connector.proj(reference(torch.cat([f.prefix, f.patches.flatten(1, 2)], dim=1)))
