"""Connectors: what lies between a vision encoder and a language model."""

from __future__ import annotations

import difflib

from .base import Connector, VisionFeatures
from .mlp import MLP, linear

CONNECTORS = {
    "linear": linear,
    "mlp": MLP,
}


def build_connector(
    name: str,
    in_dim: int | tuple[int, ...],
    out_dim: int,
    input_grid: tuple[int, int] | None = None,
    **options,
) -> Connector:
    """Build the connector called `name`, from features `in_dim` wide to tokens `out_dim` wide."""
    if name not in CONNECTORS:
        near = difflib.get_close_matches(name, CONNECTORS, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"Unknown connector '{name}'.{hint} Available: {', '.join(CONNECTORS)}")
    return CONNECTORS[name](in_dim, out_dim, **options)


__all__ = ["CONNECTORS", "Connector", "VisionFeatures", "build_connector"]
