"""`Batch`: the model's input, text and images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .visual import Visual


class Targets(NamedTuple):
    """The K positions of a batch that have a target, in order: a loss reads them without a search on the device.

    positions ``(K,)``: ``row * T + column``; ids ``(K,)``: the tokens to predict; weights ``(K,)`` float32; sources
    ``(K,)``: the number of the data source of each.
    """

    positions: Tensor
    ids: Tensor
    weights: Tensor
    sources: Tensor


class Decoder(NamedTuple):
    """The parts of the rows of a batch that an encoder-decoder model reads.

    starts ``(B,)``: the column at which the decoder's part of a row begins; all columns before it are the encoder's.
    encoder_width, width: the lengths of the longest parts of the encoder and of the decoder.
    """

    starts: Tensor
    encoder_width: int
    width: int


class Batch(NamedTuple):
    """The model's input; B rows padded on the right to T positions.

    Targets are already shifted: ``targets[:, t]`` is the token after position t, which the logits at t predict. Compare
    logits and targets as they are, and do not shift them again (Hugging Face's ``labels`` are not shifted).

    input_ids ``(B, T)``; targets ``(B, T)``, -100 if there is none; weights ``(B, T)`` float32, the loss weight of each
    target, 0 if there is none; lengths ``(B,)``; trained: the targets as a list. visual: the images and their positions
    in the text; None without an encoder. positions: rotary positions ``(B, T)``, or ``(R, B, T)`` for a language model
    that reads R rows of them; None for 0, 1, ... in each row.

    A packed batch has one row of several samples: positions ``(1, T)`` or ``(R, 1, T)``, starting at 0 in each sample;
    boundaries ``(S + 1,)`` int32, the start of each of the S samples and the end of the row, None otherwise; segments
    ``(S,)``: their lengths, which stay on the host. A sample may be a message tree: several dialogues after the same
    images, whose positions continue those of the images in each. prefix ``(B,)`` (of a packed batch ``(S,)``), branch
    ``(B, T)``, which stays on the host, and bidirectional ``(B, T)`` say which positions see each other, see
    `vlmtrain.model.attention`. decoder: of an encoder-decoder model, which part of a row its decoder reads. ids: of the
    samples.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    lengths: Tensor
    visual: Visual | None = None
    positions: Tensor | None = None
    boundaries: Tensor | None = None
    segments: Tensor | None = None
    prefix: Tensor | None = None
    branch: Tensor | None = None
    bidirectional: Tensor | None = None
    trained: Targets | None = None
    decoder: Decoder | None = None
    ids: tuple[str, ...] = ()

    @property
    def text_positions(self) -> Tensor:
        """Positions ``(1, T)`` in the samples of a packed batch, as if they were text."""
        sizes = self.boundaries.diff()
        starts = torch.repeat_interleave(self.boundaries[:-1], sizes, output_size=self.input_ids.shape[1])
        return (torch.arange(self.input_ids.shape[1], device=starts.device) - starts)[None]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Move the tensors to a device, normalize pixels there, and convert them to `dtype` (default: float32)."""
        moved = Batch(*(t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in self))
        return moved._replace(
            trained=self.trained and Targets(*(t.to(device, non_blocking=True) for t in self.trained)),
            visual=self.visual and self.visual.to(device, dtype),
            decoder=self.decoder and self.decoder._replace(starts=self.decoder.starts.to(device, non_blocking=True)),
            segments=self.segments,
            branch=self.branch,
        )
