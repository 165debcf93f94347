"""The transformer blocks of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def block_list(module: nn.Module) -> tuple[str, int]:
    """Path and number of the blocks of a part: its `block_path` or, if it has none, its longest list of modules.

    The outermost one counts if several are equal. Raises ValueError if there is no list.
    """
    path = getattr(module, "block_path", None)
    if path is not None:
        return path, len(module.get_submodule(path))
    lists = [(name, len(m)) for name, m in module.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    if not lists:
        raise ValueError(f"{type(module).__name__} has no list of blocks")
    return max(lists, key=lambda entry: (entry[1], -entry[0].count(".")))


@contextmanager
def first_blocks(llm: nn.Module, count: int = 2) -> Iterator[None]:
    """Let a Hugging Face language model run its first `count` blocks only."""
    parent, _, name = block_list(llm)[0].rpartition(".")
    owner, config = llm.get_submodule(parent), llm.config.get_text_config()
    blocks, before = getattr(owner, name), config.num_hidden_layers
    setattr(owner, name, blocks[:count])
    config.num_hidden_layers = count
    try:
        yield
    finally:
        setattr(owner, name, blocks)
        config.num_hidden_layers = before
