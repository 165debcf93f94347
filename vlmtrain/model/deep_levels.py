"""Adds visual features to the outputs of a language model's first blocks (DeepStack, Meng et al., 2024, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import first_line
from .blocks import block_list, first_blocks
from .encoder_decoder import is_encoder_decoder


def receive_levels(llm: nn.Module, count: int) -> None:
    """Prepare the first `count` blocks of a language model for levels; without levels nothing changes.

    A level arrives as a keyword argument of the model, which Hugging Face models pass on to their blocks, so gradient
    checkpointing computes with the same levels again. Raises ValueError for a model that does not pass them on, which
    the first blocks are run to find out, or that has fewer blocks.
    """
    if not count:
        return
    if is_encoder_decoder(llm.config):
        raise ValueError(
            f"{type(llm).__name__} is an encoder-decoder model, which does not support levels that are added to its "
            "blocks: use another connector or connector.levels=0"
        )
    path, number = block_list(llm)
    blocks = llm.get_submodule(path)
    if number < count:
        raise ValueError(f"{count} levels are to be added to blocks of the language model, which has only {number}")
    if any(isinstance(hook, _AddLevel) for hook in blocks[0]._forward_hooks.values()):
        return
    hooks = [_AddLevel(number) for number in range(count)]
    handles = [block.register_forward_hook(hook, with_kwargs=True) for block, hook in zip(blocks, hooks)]
    table = llm.get_input_embeddings().weight
    row = table.new_zeros(1, 2, table.shape[1])
    options = {"levels": (row[0, :1],) * count, "visual_mask": torch.tensor([[True, False]], device=table.device)}
    if table.is_meta:  # where transformers cannot make a mask
        options["attention_mask"] = row.new_zeros(1, 1, 2, 2)
    try:
        with torch.no_grad(), first_blocks(llm, count):
            llm(inputs_embeds=row, use_cache=False, **options)
        problem = None if all(hook.has_added for hook in hooks) else "its blocks do not receive them"
    except Exception as error:  # the code of a model can raise anything, without weights in particular
        problem = None if table.is_meta else first_line(error)
    if problem:
        for handle in handles:
            handle.remove()
        raise ValueError(
            f"{type(llm).__name__} does not support levels that are added to its first blocks ({problem}): use another "
            "language model or connector.levels=0"
        )


class _AddLevel:
    """Forward hook of a block: adds its level to the hidden states at the visual positions."""

    def __init__(self, number: int):
        self.number, self.has_added = number, False

    def __call__(self, block: nn.Module, arguments: tuple, options: dict, output: Tensor | tuple) -> Tensor | tuple:
        levels = options.get("levels")
        if not levels:
            return output
        self.has_added = True
        hidden = output if isinstance(output, Tensor) else output[0]
        level = torch.zeros_like(hidden).masked_scatter(
            options["visual_mask"].unsqueeze(-1), levels[self.number].to(hidden.dtype)
        )
        return hidden + level if isinstance(output, Tensor) else (hidden + level, *output[1:])


@contextmanager
def at_prefill(llm: nn.Module, prompts: int, **arguments: Sequence[Tensor] | Tensor | None) -> Iterator[None]:
    """Pass further keyword arguments to a model's first call within the context, which reads the prompts.

    ``generate`` itself would refuse them. Tensors have one row per prompt, and are repeated if a search continues each
    prompt several times; `levels` have one row per visual position.
    """
    given = {key: value for key, value in arguments.items() if value is not None and len(value)}
    if not given:
        yield
        return

    def add(module: nn.Module, called: tuple, options: dict) -> tuple[tuple, dict]:
        handle.remove()
        times = len(options["inputs_embeds"]) // prompts
        return called, {**options, **_repeated(given, times)}

    handle = llm.register_forward_pre_hook(add, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _repeated(given: dict, times: int) -> dict:
    if times == 1:
        return given
    repeated = {key: value.repeat_interleave(times, 0) for key, value in given.items() if isinstance(value, Tensor)}
    if "levels" in given:
        counts = given["visual_mask"].sum(1).tolist()
        levels = (level[: sum(counts)].split(counts) for level in given["levels"])  # without those of a stand-in
        by_row = ([row for row in level for _ in range(times)] for level in levels)
        repeated["levels"] = tuple(map(torch.cat, by_row))
    return repeated
