"""Helpers shared by all references: rescaled weights, Hugging Face classes, loading, patch order."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from vlmtrain.connectors import Connector

C, D = 16, 24  # widths of the tiny encoder and language model


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
    """Load the reference's state dict under a prefix, with additional tensors."""
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
