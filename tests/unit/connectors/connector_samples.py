"""Small versions of all connectors, and features for them."""

from __future__ import annotations

import torch
from reference_tools import C, D

from vlmtrain.connectors import Connector, VisionFeatures, build_connector

SMALL = {
    "linear": {},
    "mlp": {},
    "identity": {},
    "avgpool": {},
    "attentional_pool": {"num_heads": 4, "intermediate_size": 32},
    "qwen_vl_resampler": {"grid": 4, "num_heads": 2},
    "qwen2_vl_merger": {},
    "qwen2_5_vl_merger": {},
    "qwen3_vl_merger": {"levels": 2},
    "hunyuan_merger": {},
    "qformer": {"num_queries": 5, "hidden_size": 32, "depth": 3, "num_heads": 4, "intermediate_size": 48},
    "perceiver_resampler": {"num_queries": 5, "depth": 2, "num_heads": 2, "head_dim": 8},
    "idefics_resampler": {"num_queries": 5, "depth": 2, "num_heads": 2, "head_dim": 8},
    "c_abstractor": {"grid": 3, "hidden_size": 20, "depth": 2},
    "d_abstractor": {"grid": 3, "hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 40},
    "ldp": {},
    "ldpv2": {"grid": 3},
    "meq_former": {"hidden_dim": 20, "hidden_size": 32, "depth": 3, "num_heads": 4, "intermediate_size": 48},
    "vss": {},
    "pixel_shuffle": {},
    "token_packer": {"hidden_size": 32, "num_heads": 4},
    "spatial_aggregator": {"grid": 3, "hidden_size": 32, "depth": 2, "num_heads": 4},
}
SEVERAL = ("meq_former", "spatial_aggregator")
VARIANTS = [
    *SMALL.items(),
    ("mlp", {"depth": 3, "hidden_dim": 20, "activation": "silu"}),
    ("mlp", {"depth": 1}),
    ("avgpool", {"window": 3}),
    ("attentional_pool", {"num_heads": 4, "levels": 0, "head": "linear", "window": 3}),
    ("qwen2_vl_merger", {"factor": 3}),
    ("qwen3_vl_merger", {}),
    ("pixel_shuffle", {"head": "internvl"}),
    ("qformer", {**SMALL["qformer"], "vision_norm": True, "text_vocab": 50}),
    ("meq_former", {**SMALL["meq_former"], "text_vocab": 50}),
    ("vss", {"head": "mlp", "scan": "cross", "hidden_size": 20}),
    ("token_packer", {"hidden_size": 32, "factor": 3, "levels": 1}),
]


def variant_id(variant: tuple[str, dict]) -> str:
    name, options = variant
    extra = {key: value for key, value in options.items() if SMALL[name].get(key) != value}
    return "-".join([name, *(f"{key}={value}" for key, value in extra.items())])


def small(name: str, input_grid: tuple[int, int] = (6, 6), **options) -> Connector:
    """A tiny connector, with two encoders if it takes several."""
    in_dim = (C, 12) if name in SEVERAL else C
    return build_connector(name, in_dim, D, input_grid=input_grid, **options)


def features(connector: Connector, grid: tuple[int, int], batch: int = 2, **kind):
    """Random features of every encoder of a connector, with a CLS token."""

    def one(width: int) -> VisionFeatures:
        return VisionFeatures(
            torch.randn(batch, *grid, width, **kind),
            torch.randn(batch, 1, width, **kind),
            tuple(torch.randn(batch, *grid, width, **kind) for _ in range(connector.num_levels)),
        )

    if isinstance(connector.in_dim, tuple):
        return tuple(one(width) for width in connector.in_dim)
    return one(connector.in_dim)


def instruction(connector: Connector, batch: int = 2, device=None) -> dict[str, torch.Tensor]:
    """text_ids and text_mask if the connector reads text."""
    if not connector.reads_text:
        return {}
    return {
        "text_ids": torch.randint(50, (batch, 6), device=device),
        "text_mask": torch.arange(6, device=device).expand(batch, 6) < 4,
    }
