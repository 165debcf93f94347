"""Connectors between a vision encoder and a language model.

A connector turns the features of an ``H x W`` grid of patches into visual tokens of the language model's width.
Each family has its own file; `CONNECTORS` maps the exact names to the classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from ..registry import Registry
from .base import Connector, Features, PackedFeatures, VisionFeatures
from .honeybee import CAbstractor, DAbstractor
from .hunyuan import HunyuanMerger
from .identity import Identity
from .ldp import LDP, LDPv2
from .meq_former import MEQFormer
from .mergers import PixelShuffle, Qwen2VLMerger, Qwen3VLMerger, Qwen25VLMerger
from .mlp import MLP, Linear
from .perceiver import IdeficsResampler, PerceiverResampler
from .pooling import AttentionalPool, AvgPool
from .qformer import QFormer
from .qwen_vl import QwenVLResampler
from .spatial_aggregator import SpatialAggregator
from .token_packer import TokenPacker
from .vss import VSS

_CLASSES: dict[str, type[Connector]] = {
    "linear": Linear,
    "mlp": MLP,
    "identity": Identity,
    "avgpool": AvgPool,
    "attentional_pool": AttentionalPool,
    "qwen_vl_resampler": QwenVLResampler,
    "qwen2_vl_merger": Qwen2VLMerger,
    "qwen2_5_vl_merger": Qwen25VLMerger,
    "qwen3_vl_merger": Qwen3VLMerger,
    "hunyuan_merger": HunyuanMerger,
    "qformer": QFormer,
    "perceiver_resampler": PerceiverResampler,
    "idefics_resampler": IdeficsResampler,
    "c_abstractor": CAbstractor,
    "d_abstractor": DAbstractor,
    "ldp": LDP,
    "ldpv2": LDPv2,
    "meq_former": MEQFormer,
    "vss": VSS,
    "pixel_shuffle": PixelShuffle,
    "token_packer": TokenPacker,
    "spatial_aggregator": SpatialAggregator,
}
CONNECTORS: Registry[Connector] = Registry(
    "connector", Connector, _CLASSES, builder="__init__", fixed=("in_dim", "out_dim", "input_grid")
)
register = CONNECTORS.register


def build_connector(
    name: str,
    in_dim: int | tuple[int, ...],
    out_dim: int | None,
    input_grid: tuple[int, int] | tuple[tuple[int, int], ...] | None = None,
    **options,
) -> Connector:
    """Build the connector `name`, which maps features of width `in_dim` to tokens of width `out_dim`.

    in_dim is a tuple for a connector that takes several encoders. out_dim is None if there is no language model yet,
    which is allowed for connectors that can be trained alone (`Connector.stands_alone`). input_grid, the encoder's
    patch grid, is required by connectors with position tables of a fixed size; if it is given, a connector that does
    not support that grid raises immediately. For several encoders it is one grid per encoder, or one that all share.
    Raises ValueError for unknown names, options and sizes that do not fit.
    """
    CONNECTORS.check_options(name, options)
    connector_class = CONNECTORS[name]
    encoders = len(in_dim) if connector_class.several_encoders and isinstance(in_dim, tuple | list) else 1
    grids = None if input_grid is None else _grids(input_grid, encoders)
    if out_dim is None and not connector_class.stands_alone:
        alone = ", ".join(key for key, each in CONNECTORS.items() if each.stands_alone)
        raise ValueError(
            f"connector={name} needs the width of a language model, but there is no language model: add the part "
            f"llm, or use a connector that can be trained alone ({alone})"
        )
    if "input_grid" in inspect.signature(connector_class).parameters:
        options["input_grid"] = grids if grids is None or connector_class.several_encoders else grids[0]
    connector = connector_class(in_dim, out_dim, **options)
    for encoder, grid in enumerate(grids or ()):
        connector.check_grid(*grid, encoder=encoder)
    return connector


def _grids(input_grid: Sequence, encoders: int) -> tuple[tuple[int, int], ...]:
    """The patch grid of each encoder, from one per encoder or one that all share."""
    listed = isinstance(input_grid, Sequence) and not any(isinstance(side, int) for side in input_grid)
    grids = input_grid if listed else (input_grid,) * encoders
    for grid in grids:
        if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(side, int) for side in grid):
            raise ValueError(f"input_grid={input_grid!r}: expected two integers, (height, width)")
    if len(grids) != encoders:
        raise ValueError(
            f"input_grid={input_grid!r}: expected one grid per encoder ({encoders}), or one that all share"
        )
    return tuple(map(tuple, grids))


__all__ = [
    "CONNECTORS",
    "Connector",
    "Features",
    "PackedFeatures",
    "VisionFeatures",
    "build_connector",
    "register",
]
