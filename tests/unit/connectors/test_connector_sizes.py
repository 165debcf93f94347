"""Parameter counts at the published dimensions, on the meta device."""

import pytest
import torch

from vlmtrain.connectors import build_connector

LEVEL = 25_180_160  # one DeepStack merger of Qwen3-VL

SIZES = [
    ("linear", 1024, 4096, {}, 4_198_400, "4.20"),
    ("mlp", 1024, 4096, {}, 20_979_712, "20.98"),
    ("mlp", 2176, 4096, {"depth": 3, "hidden_dim": [8704, 4096]}, 71_385_600, "71.4"),  # Prismatic
    ("avgpool", 1024, 4096, {}, 4_198_400, "4.20"),
    ("attentional_pool", 1152, 4096, {}, 87_937_536, "87.9"),
    ("attentional_pool", 1152, 4096, {"levels": 0, "head": "linear"}, 10_035_712, "10.0"),
    ("qwen_vl_resampler", 1664, 4096, {}, 91_791_360, "91.8"),
    ("qwen2_vl_merger", 1280, 1536, {}, 34_087_936, "34.09"),
    ("qwen2_5_vl_merger", 1280, 2048, {}, 36_708_608, "36.71"),
    ("qwen3_vl_merger", 1024, 2048, {}, 25_174_016, "25.17"),
    ("qwen3_vl_merger", 1024, 2048, {"levels": 3}, 25_174_016 + 3 * LEVEL, "100.71"),
    ("hunyuan_merger", 1152, 1024, {}, 25_969_024, "25.97"),
    ("qformer", 1408, 2560, {}, 107_130_880, "107.1"),
    ("perceiver_resampler", 1024, 1024, {}, 63_019_008, "63.0"),
    ("perceiver_resampler", 1408, 1408, {}, 112_603_392, "112.6"),
    ("idefics_resampler", 1280, 1280, {}, 125_961_984, "126.0"),
    ("c_abstractor", 1024, 4096, {}, 37_398_016, "37.4"),
    ("d_abstractor", 1024, 4096, {}, 55_944_032, "55.9"),
    ("ldp", 1024, 2048, {}, 18_936_832, "18.94"),
    ("ldpv2", 1024, 2048, {}, 6_316_032, "6.32"),
    ("vss", 1152, 2560, {}, 50_754_560, "50.8"),
    ("pixel_shuffle", 1152, 4096, {}, 18_874_368, "18.87"),
    ("pixel_shuffle", 1024, 4096, {"head": "internvl"}, 33_570_816, "33.6"),
    ("token_packer", 1024, 4096, {}, 36_722_688, "36.7"),
]


@pytest.mark.parametrize(("name", "in_dim", "out_dim", "options", "count", "millions"), SIZES)
def test_parameters(name, in_dim, out_dim, options, count, millions):
    with torch.device("meta"):
        connector = build_connector(name, in_dim, out_dim, input_grid=(24, 24), **options)
    total = sum(parameter.numel() for parameter in connector.parameters())
    assert total == count
    assert f"{total / 1e6:.{len(millions.split('.')[1])}f}" == millions


def test_qformer_parts():
    with torch.device("meta"):
        plain = build_connector("qformer", 1408, 2560)
        text = build_connector("qformer", 1408, 2560, text_vocab=30523)
    core = sum(parameter.numel() for parameter in plain.core.parameters()) - plain.core.query_tokens.numel()
    assert f"{core / 1e6:.1f}" == "105.1"
    # The first stage adds its heads: two projections of width 256, a matching head and a tied language modeling head.
    stage_one = sum(parameter.numel() for parameter in text.core.parameters())
    stage_one += 2 * (768 * 256 + 256) + (768 * 2 + 2) + (768 * 768 + 768) + 2 * 768 + 30523
    assert f"{stage_one / 1e6:.1f}" == "186.7"


def test_qwen_vl_without_the_parts_that_belong_to_the_tower():
    with torch.device("meta"):
        connector = build_connector("qwen_vl_resampler", 1664, 4096)
    tower = connector.proj.numel() + sum(parameter.numel() for parameter in connector.ln_post.parameters())
    total = sum(parameter.numel() for parameter in connector.parameters())
    assert f"{(total - tower) / 1e6:.1f}" == "75.0"
    assert f"{(total - tower + connector.positions.numel()) / 1e6:.1f}" == "76.1"


def test_meq_former_is_near_the_papers_116_million():
    """EVA-CLIP-g, CLIP-L/14, SILC-G/16, ViT-e and DINOv2-L/14, before FlanT5-XL; some widths are assumed."""
    with torch.device("meta"):
        connector = build_connector("meq_former", (1408, 1024, 1152, 1792, 1024), 2048)
    total = sum(parameter.numel() for parameter in connector.parameters())
    assert 115e6 < total < 117e6


def test_spatial_aggregator_has_the_size_of_cambrian():
    """SigLIP, CLIP and DINOv2-giant on 24x24, four stages of ConvNeXt-XXL on 96x96, before LLaMA-3-8B; from shapes."""
    widths, dim, out = (1152, 1024, 1536, 384 + 768 + 1536 + 3072), 1024, 4096
    with torch.device("meta"):
        connector = build_connector("spatial_aggregator", widths, out, input_grid=(*((24, 24),) * 3, (96, 96)))
    square, norm = dim * dim, 2 * dim
    maps = sum(width * dim + dim + square + dim + norm for width in widths)
    projections = 1 + 2 + 2 + 1  # context, in (twice as wide), out (two layers), attention's output
    attention = (1 + 2 * len(widths)) * (norm + square)
    layer = projections * square + norm + attention + 16 * dim
    head = dim * out + out + out * out + out
    total = sum(parameter.numel() for parameter in connector.parameters())
    assert total == maps + 3 * layer + dim + head
