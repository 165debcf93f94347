"""`torch.compile` for the transformer blocks of the encoder and the language model, which share the same code."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..model.blocks import block_list


def compile_blocks(parts: Mapping[str, nn.Module]) -> None:
    """Compile every transformer block separately, with dynamic shapes, so that one compilation serves all blocks.

    Modules, parameters and names do not change.
    """
    for part in (part for part in ("vision", "llm") if part in parts):
        path, _ = block_list(parts[part])
        for block in parts[part].get_submodule(path):
            block.compile(dynamic=True)
