"""A rendered conversation: its tokens, and what they are trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..visual import NO_MEDIA, MediaPlan, Size

IGNORE = -100
LOSS_PER = ("token", "sample", "sqrt")


class SampleLength(NamedTuple):
    """What must be known of a sample to plan a step: its numbers of tokens, of image tokens, of images and of items.

    sizes: the different sizes ``(H, W)`` in pixels at which the encoder is shown its images.
    """

    tokens: int
    image_tokens: int
    images: int
    items: int
    sizes: frozenset[Size]

    @classmethod
    def of(cls, tokens: int, media: MediaPlan) -> SampleLength:
        """The length of a sample of so many tokens with planned `media`."""
        slots = sum(placement.slots for placement in media.placements)
        sizes = frozenset(item.pixels[0] for item in media.items)
        return cls(tokens, slots, len(media.by_medium), len(media.items), sizes)


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens, each tensor ``(T,)``.

    input_ids:   token ids; a filler at image positions.
    targets:     the id that position t must predict (the token at t + 1), or IGNORE.
    weights:     loss weight of that target, float32; 0 if there is no target.
    index:       the placement to which a position belongs, -1 for text.
    answers:     for each assistant turn, the range of its tokens including the end of turn;
                 ``input_ids[:start]`` is its prompt.
    media:       the items and placements of the sample.
    positions:   rotary positions ``(R, T)``, for a language model that reads rows of them.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    index: Tensor
    answers: tuple[tuple[int, int], ...]
    media: MediaPlan = NO_MEDIA
    positions: Tensor | None = None

    def until(self, end: int, answers: tuple[tuple[int, int], ...] = ()) -> Rendered:
        """The first `end` positions as a prompt, without targets."""
        targets, weights = torch.full((end,), IGNORE), torch.zeros(end)
        positions = None if self.positions is None else self.positions[:, :end]
        return Rendered(self.input_ids[:end], targets, weights, self.index[:end], answers, self.media, positions)

    def weighed(self, per: str) -> Rendered:
        """The sample with other loss weights.

        per: ``token``, unchanged; ``sample``, divided by their sum, so that every sample counts the same; ``sqrt``,
        divided by the root of their sum (the square averaging of InternVL 2.5, 2024).
        """
        total = float(self.weights.sum()) or 1.0
        divisors = {"token": 1.0, "sample": total, "sqrt": total**0.5}
        return self if per == "token" else replace(self, weights=self.weights / divisors[per])

    @property
    def length(self) -> SampleLength:
        return SampleLength.of(len(self), self.media)

    def __len__(self) -> int:
        return len(self.input_ids)
