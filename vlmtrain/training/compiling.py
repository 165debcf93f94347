"""`torch.compile` for the blocks of encoder and language model, which are the same code over and over."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .trainable import block_list

COMPILED = ("vision", "llm")


def compile_blocks(parts: Mapping[str, nn.Module]) -> None:
    """Compile every transformer block by itself, for any batch and length: one compilation serves them all.

    What is compiled has the same modules, parameters and names.
    """
    for part in (part for part in COMPILED if part in parts):
        path, _ = block_list(parts[part])
        for block in parts[part].get_submodule(path):
            block.compile(dynamic=True)
