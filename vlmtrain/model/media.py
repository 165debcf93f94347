"""What the layers of a fusion read between the blocks of a language model, and how the blocks call these layers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import block_list
from .within import Within


class Media(NamedTuple):
    """Visual tokens that are not in the text.

    tokens ``(N, M, C)``: of each image; images ``(B, n)``: numbers of the images of each row; sees ``(B, T, 1)`` bool:
    whether a position sees an image; mask ``(B, T, n * M)`` bool: which tokens of the row's images it sees, all if it
    sees no image, because a softmax over nothing is NaN.
    """

    tokens: Tensor
    images: Tensor
    sees: Tensor
    mask: Tensor

    def at(self, columns: Tensor) -> Media:
        """The media with other positions: of each row, those at `columns` ``(B, T)``."""
        sees, mask = (each.take_along_dim(columns[..., None], dim=1) for each in (self.sees, self.mask))
        return self._replace(sees=sees, mask=mask)

    def repeated(self, times: int) -> Media:
        """The media with each row repeated, for a search that continues each prompt several times."""
        images, sees, mask = (each.repeat_interleave(times, 0) for each in self[1:])
        return Media(self.tokens, images, sees, mask)

    def of_last(self, count: int) -> Media:
        """The media for `count` new positions, which see what the last one of the prompt sees."""
        return self._replace(sees=self.sees[:, -1:], mask=self.mask[:, -1:].expand(-1, count, -1))


class Reading:
    """The media that the layers of a fusion read at the moment; without any, the language model runs without them."""

    def __init__(self) -> None:
        self.media: Media | None = None
        self.known: dict[nn.Module, tuple[Tensor, Tensor]] | None = None

    def of(self, media: Media | None, continues: bool = False) -> AbstractContextManager:
        """Context in which the layers read `media`.

        continues: whether the first call of the language model reads prompts, and later ones continue them. The keys
        and values of the media are then computed once.
        """
        return Within(self, media=media, known={} if continues else None)

    def when_recomputing(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The `context_fn` of a checkpoint: activations are recomputed with the media of the forward pass."""
        return nullcontext(), Within(self, media=self.media, known=None)


def call_before_blocks(llm: nn.Module, layers: Mapping[int, nn.Module], reading: Reading) -> None:
    """Make the blocks of a language model pass their input through `layers`, by the number of the block.

    The layers do not become a part of the model: its names and its own weights stay as they are.
    """
    blocks = llm.get_submodule(block_list(llm)[0])
    for number, layer in layers.items():
        hooks = blocks[number]._forward_pre_hooks.values()
        if not any(isinstance(hook, _Before) and hook.layer is layer for hook in hooks):
            blocks[number].register_forward_pre_hook(_Before(layer, reading), with_kwargs=True)


class _Before:
    """Forward pre-hook of a block."""

    def __init__(self, layer: nn.Module, reading: Reading):
        self.layer, self.reading = layer, reading

    @torch._disable_dynamo
    def __call__(self, block: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
        if self.reading.media is None:
            return arguments, options
        if arguments:
            return (self._read(arguments[0]), *arguments[1:]), options
        return arguments, {**options, "hidden_states": self._read(options["hidden_states"])}

    def _read(self, states: Tensor) -> Tensor:
        """The states ``(B, T, D)`` after the layer."""
        media, known = self.reading.media, self.reading.known
        found = None if known is None else known.get(self.layer)
        if found is not None:
            media = media.of_last(states.shape[1])
        times = len(states) // len(media.images)
        if times > 1:
            media = media.repeated(times)
        found = found or self.layer.read(media)
        if known is not None:
            known[self.layer] = found
        return self.layer(states, *found, media.sees, media.mask)
