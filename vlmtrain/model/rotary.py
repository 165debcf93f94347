"""Rotary positions with several rows, such as time, height and width, for language models that read only one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

KEY = "multimodal_rotary"  # of a language model's configuration: {"positions": ..., "section": [...]}


def _chunks(section: Sequence[int]) -> list[int]:
    return [row for row, count in enumerate(section) for _ in range(count)] * 2


def _interleaved(section: Sequence[int]) -> list[int]:
    """Row i owns the frequencies i, i + 3, ..., and the first row owns the others."""
    owner = [0] * sum(section)
    for row, count in enumerate(section[1:], start=1):
        owner[row : len(section) * count : len(section)] = [row] * count
    return owner * 2


def _channels(section: Sequence[int]) -> list[int]:
    """Chunks of channels, so the two channels that a frequency rotates belong to different rows."""
    return [row for row, count in enumerate(section) for _ in range(2 * count)]


class Division(NamedTuple):
    """How the frequencies of a head are divided among rows of positions.

    published: numbers of frequencies of each row for heads with 64. owner: from such numbers to the row that owns each
    channel of the head.
    """

    published: tuple[int, ...]
    owner: Callable[[Sequence[int]], list[int]]

    def section(self, frequencies: int) -> tuple[int, ...]:
        """Numbers of frequencies of each row in the published proportions."""
        ends = [round(frequencies * end / sum(self.published)) for end in accumulate(self.published)]
        return tuple(end - start for start, end in pairwise([0, *ends]))


DIVISIONS = {
    "mrope": Division((16, 24, 24), _chunks),  # Qwen2-VL, Qwen2.5-VL
    "interleaved_mrope": Division((24, 20, 20), _interleaved),  # Qwen3-VL
    "xdrope": Division((16, 16, 16, 16), _channels),  # HunyuanOCR
}


class MultimodalRotary(nn.Module):
    """A rotary embedding whose frequencies are divided among several rows of positions (M-RoPE; Qwen2-VL, section 2.1).

    embedding: the model's own. positions: name of the rows and of their division, one of `DIVISIONS`. section: number
    of frequencies of each row. Without rows, and for rows that are equal, the result is that of `embedding`.
    """

    def __init__(self, embedding: nn.Module, positions: str, section: Sequence[int]):
        super().__init__()
        self.embedding, self.positions, self.num_rows = embedding, positions, len(section)
        self.register_buffer("owner", torch.tensor(DIVISIONS[positions].owner(section)), persistent=False)
        self.rows: Tensor | None = None
        self.lengths: Tensor | None = None
        self.is_read = False

    def __getattr__(self, name: str):
        """Attributes of the model's own embedding, which transformers reads (``inv_freq``, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("embedding"), name)

    def forward(self, x: Tensor, position_ids: Tensor, *arguments, **options) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``(B, T, d)``; `position_ids` are those of text, which `rows` replace."""
        if self.rows is None:
            return self.embedding(x, position_ids, *arguments, **options)
        cos, sin = zip(*(self.embedding(x, row, *arguments, **options) for row in self._rows(position_ids, len(x))))
        owner = self.owner.to(x.device)
        return _mixed(torch.stack(cos), owner), _mixed(torch.stack(sin), owner)

    def _rows(self, position_ids: Tensor, batch: int) -> Tensor:
        """Positions ``(R, B, T)``: those of the prompt, then one after the largest for each generated token."""
        times = batch // self.rows.shape[1]  # a search continues each prompt several times
        if not self.is_read:
            self.is_read = True
            return self.rows.repeat_interleave(times, 1)
        ahead = self.rows.amax((0, 2)) + 1 - self.lengths
        return (position_ids + ahead.repeat_interleave(times)[:, None]).expand(len(self.rows), -1, -1)


def _mixed(parts: Tensor, owner: Tensor) -> Tensor:
    """From ``(R, B, T, d)``, the row that owns each of the d channels."""
    return parts.gather(0, owner.expand(1, *parts.shape[1:]))[0]


def use_multimodal_rotary(llm: nn.Module, positions: str, section: Sequence[int] | None = None) -> None:
    """Make a language model read rows of positions; model folders remember it. Its text-only logits do not change.

    positions, section: see `MultimodalRotary`; without a section, the published proportions. Raises ValueError for a
    model whose rotary positions cannot be replaced or that reads other rows, and for a section that does not fit them.
    """
    given = f"llm.positions={positions}"
    base, name, known = llm.base_model, type(llm).__name__, positions_of(llm)
    if known is not None:
        if known != positions:
            raise ValueError(f"{given}, but the language model was trained with {known}")
        return
    embedding = getattr(base, "rotary_emb", None)
    frequencies = getattr(embedding, "inv_freq", None)
    if frequencies is None:
        raise ValueError(f"{given}: {name} has no rotary positions of one kind that could be replaced")
    section = tuple(section or DIVISIONS[positions].section(len(frequencies)))
    if sum(section) != len(frequencies):
        raise ValueError(f"{given}: {section} does not sum to the {len(frequencies)} frequencies of {name}")
    base.rotary_emb = MultimodalRotary(embedding, positions, section).to(frequencies.device)
    setattr(llm.config.get_text_config(), KEY, {"positions": positions, "section": list(section)})


def restore_multimodal_rotary(llm: nn.Module) -> None:
    """Do what the configuration of a loaded model says, if `use_multimodal_rotary` was called before it was saved."""
    saved = getattr(llm.config.get_text_config(), KEY, None)
    if saved is not None:
        use_multimodal_rotary(llm, **saved)


def positions_of(llm: nn.Module) -> str | None:
    """Name of the rows of positions that a language model reads, one of `DIVISIONS`; None for ordinary positions."""
    rotary = getattr(llm.base_model, "rotary_emb", None)
    return rotary.positions if isinstance(rotary, MultimodalRotary) else None


@contextmanager
def rows_of_positions(
    llm: nn.Module, positions: Tensor | None, lengths: Tensor, are_read: bool = False
) -> Iterator[None]:
    """Give a language model the `positions` ``(R, B, T)`` of a batch with rows of `lengths` ``(B,)`` real positions.

    are_read: whether the model continues from a cache of all but the last position of the rows, which is text. Raises
    ValueError if one of the model and the batch has rows and the other does not.
    """
    given = len(positions) if positions is not None and positions.ndim == 3 else 0
    rotary = getattr(llm.base_model, "rotary_emb", None)
    read = rotary.num_rows if isinstance(rotary, MultimodalRotary) else 0
    if given != read:
        raise ValueError(
            f"the batch has {given} rows of positions, but the language model reads {read}: model and processor must "
            "be built with the same llm.positions"
        )
    if not given:
        yield
        return
    rotary.rows, rotary.lengths, rotary.is_read = positions, lengths, are_read
    try:
        yield
    finally:
        rotary.rows = rotary.lengths = None
