"""Rotary positions with several rows, such as time, height and width, for language models that know only one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

KEY = "multimodal_rotary"  # of a language model's configuration: {"section": [...], "interleaved": ...}


class MultimodalRotary(nn.Module):
    """A rotary embedding whose frequencies are divided among several rows of positions (M-RoPE; Qwen2-VL, section 2.1).

    embedding: the model's own. section: number of frequencies of each row. interleaved: whether neighboring
    frequencies belong to different rows (Qwen3-VL), not to contiguous chunks (Qwen2-VL). Without rows, and for rows
    that are equal, the result is that of `embedding`.
    """

    def __init__(self, embedding: nn.Module, section: Sequence[int], interleaved: bool = False):
        super().__init__()
        self.embedding = embedding
        owner = [row for row, count in enumerate(section) for _ in range(count)]
        if interleaved:  # row i owns count frequencies: i, i + 3, ...; the first row owns the others
            owner = [0] * len(owner)
            for row, count in enumerate(section[1:], start=1):
                owner[row : len(section) * count : len(section)] = [row] * count
        self.register_buffer("owner", torch.tensor(owner * 2), persistent=False)
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


def default_section(frequencies: int) -> tuple[int, int, int]:
    """Numbers of frequencies of time, height and width in the proportions of Qwen2-VL: 16, 24 and 24 of 64."""
    time = frequencies // 4
    height = (frequencies - time) // 2
    return time, height, frequencies - time - height


def use_multimodal_rotary(llm: nn.Module, section: Sequence[int] | None = None, interleaved: bool = False) -> None:
    """Make a language model read rows of positions; model folders remember it. Its text-only logits do not change.

    section: see `MultimodalRotary`; None: `default_section`. Raises ValueError for a model whose rotary positions
    cannot be replaced, and for a section that does not fit them.
    """
    base, name = llm.base_model, type(llm).__name__
    embedding = getattr(base, "rotary_emb", None)
    if isinstance(embedding, MultimodalRotary):
        return
    frequencies = getattr(embedding, "inv_freq", None)
    if frequencies is None:
        raise ValueError(f"llm.positions=mrope: {name} has no rotary positions of one kind that could be replaced")
    section = tuple(section or default_section(len(frequencies)))
    if sum(section) != len(frequencies):
        raise ValueError(f"llm.positions=mrope: {section} does not sum to the {len(frequencies)} frequencies of {name}")
    base.rotary_emb = MultimodalRotary(embedding, section, interleaved).to(frequencies.device)
    setattr(llm.config.get_text_config(), KEY, {"section": list(section), "interleaved": interleaved})


def restore_multimodal_rotary(llm: nn.Module) -> None:
    """Do what the configuration of a loaded model says, if `use_multimodal_rotary` was called before it was saved."""
    saved = getattr(llm.config.get_text_config(), KEY, None)
    if saved is not None:
        use_multimodal_rotary(llm, **saved)


def reads_rows(llm: nn.Module) -> bool:
    """Whether a language model reads rows of positions."""
    return isinstance(getattr(llm.base_model, "rotary_emb", None), MultimodalRotary)


@contextmanager
def rows_of_positions(llm: nn.Module, positions: Tensor | None, lengths: Tensor) -> Iterator[None]:
    """Give a language model the `positions` ``(R, B, T)`` of a batch with rows of `lengths` ``(B,)`` real positions.

    Raises ValueError if one of the model and the batch has rows and the other does not.
    """
    has_rows = positions is not None and positions.ndim == 3
    if has_rows != reads_rows(llm):
        lacking = "the language model does not read" if has_rows else "the batch does not have"
        raise ValueError(
            f"{lacking} rows of positions: model and processor must both be built with llm.positions=mrope, or without"
        )
    if not has_rows:
        yield
        return
    rotary = llm.base_model.rotary_emb
    rotary.rows, rotary.lengths, rotary.is_read = positions, lengths, False
    try:
        yield
    finally:
        rotary.rows = rotary.lengths = None
