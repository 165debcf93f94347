"""A rendered conversation: its tokens, and what they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..visual import NO_MEDIA, MediaPlan, Size

IGNORE = -100
LOSS_PER = ("token", "sample", "sqrt", "sqrt_dialogues")


class SampleLength(NamedTuple):
    """What must be known of a sample to plan a step: its numbers of tokens, of image tokens, of images and of items.

    sizes: see `MediaPlan`.
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
        return cls(tokens, slots, len(media.by_medium), len(media.items), media.sizes)


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens, each tensor ``(T,)``, or a message tree: several dialogues about the same images.

    input_ids:   token ids; at image positions a filler, or the token of `Geometry.slot_token`.
    targets:     the id that position t must predict (the token at t + 1), or IGNORE.
    weights:     loss weight of that target, float32; 0 if there is no target.
    index:       the placement to which a position belongs, -1 for text.
    answers:     for each assistant turn, the range of its tokens including the end of turn;
                 ``input_ids[:start]`` is its prompt.
    media:       the items and placements of the sample.
    positions:   rotary positions ``(R, T)``, for a language model that reads rows of them.
    branch:      of a tree, 0 for its first positions, which all dialogues share, and i for those of dialogue i, which
                 follow one after the other; None for a single dialogue.
    encoded:     for an encoder-decoder model, the number of first positions, which the encoder reads; the next one is
                 the decoder's start token. An answer that the encoder reads has the range (0, 0) in `answers`.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    index: Tensor
    answers: tuple[tuple[int, int], ...]
    media: MediaPlan = NO_MEDIA
    positions: Tensor | None = None
    branch: Tensor | None = None
    encoded: int | None = None

    @classmethod
    def tree(cls, dialogues: Sequence[Rendered]) -> Rendered:
        """One tree of conversations, or trees, that are equal up to their last image (`shared`)."""
        first, *others = dialogues
        if not others:
            return first
        shared, branches, answers, length = first.shared, [torch.zeros(first.shared, dtype=torch.long)], [], 0
        for each in dialogues:
            own = torch.ones(len(each), dtype=torch.long) if each.branch is None else each.branch
            branches.append(own[shared:] + int(branches[-1].max() if length else 0))
            answers += [(start + length, end + length) for start, end in each.answers]
            length += len(each) - shared

        def joined(name: str) -> Tensor:
            parts = [getattr(each, name)[..., shared:] for each in dialogues]
            return torch.cat([getattr(first, name)[..., :shared], *parts], dim=-1)

        tensors = map(joined, ("input_ids", "targets", "weights", "index"))
        positions = None if first.positions is None else joined("positions")
        return cls(*tensors, tuple(answers), first.media, positions, torch.cat(branches))

    @property
    def shared(self) -> int:
        """Number of first positions, up to the last image, that other dialogues can share; 0 if one is trained."""
        shown = (self.index >= 0).nonzero()
        end = int(shown[-1]) + 1 if len(shown) else 0
        return 0 if self.weights[:end].any() else end

    @property
    def beginning(self) -> tuple[MediaPlan, list[int]]:
        """What is equal for dialogues that can share their first positions, if they show the same media."""
        return self.media, self.input_ids[: self.shared].tolist()

    @property
    def asked(self) -> int:
        """Number of positions before the first answer."""
        return self.answers[0][0] if self.answers else len(self)

    @property
    def parts(self) -> list[int]:
        """Numbers of positions that all dialogues share, and of each dialogue behind them."""
        return [0, len(self)] if self.branch is None else self.branch.bincount().tolist()

    @property
    def dialogues(self) -> int:
        return len(self.parts) - 1

    @property
    def places(self) -> Tensor:
        """The position of each token in its own dialogue, ``(T,)``."""
        shared, *parts = self.parts
        return torch.cat([torch.arange(shared), *(torch.arange(shared, shared + part) for part in parts)])

    @property
    def squared(self) -> int:
        """Twice the number of pairs of tokens that see each other, about: the square of the length of a dialogue."""
        shared, *parts = self.parts
        return shared**2 + sum(part * (part + 2 * shared) for part in parts)

    def until(self, end: int, answers: tuple[tuple[int, int], ...] = ()) -> Rendered:
        """The first `end` positions as a prompt, without targets."""
        targets, weights = torch.full((end,), IGNORE), torch.zeros(end)
        positions = None if self.positions is None else self.positions[:, :end]
        ids, index, encoded = self.input_ids[:end], self.index[:end], self.encoded
        return Rendered(ids, targets, weights, index, answers, self.media, positions, encoded=encoded)

    def between(self, first: int, last: int, images: int | None = None) -> Rendered:
        """Positions `first` to ``last - 1``, up to the first image that is not completely among them.

        Images that start before `first`, and those after the last answer, are left out. images: maximum number of
        images, or None. The range of an answer that ends before `first` is empty.
        """
        by_medium = self.media.by_medium
        places = [(self.index == number).nonzero()[:, 0].tolist() for number in range(len(self.media.placements))]
        bounds = [(places[own[0][0]][0], places[own[-1][0]][-1]) for own in by_medium]  # first and last slot
        begin = sum(start < first for start, _ in bounds)
        if begin:
            first = max(first, bounds[begin - 1][1] + 1)
        stop = sum(end < last for _, end in bounds)
        if images is not None:
            stop = min(stop, begin + images)
        if stop < len(bounds):
            last = min(last, bounds[stop][0])
        last = max((min(end, last) for start, end in self.answers if start < last), default=first)
        stop = min(stop, sum(end < last for _, end in bounds))
        # of the placements
        begin, stop = (sum(map(len, by_medium[:number])) for number in (begin, stop))
        part = slice(first, last)
        targets, weights = self.targets[part].clone(), self.weights[part].clone()
        targets[-1:], weights[-1:] = IGNORE, 0.0
        index = torch.where(self.index[part] >= 0, self.index[part] - begin, -1)
        answers = [(start - first, min(end, last) - first) for start, end in self.answers if start < last]
        answers = [(max(start, 0), max(end, 0)) for start, end in answers]
        media = self.media.between(begin, max(begin, stop))
        positions = None if self.positions is None else self.positions[:, part]
        return Rendered(self.input_ids[part], targets, weights, index, tuple(answers), media, positions)

    def weighed(self, per: str, scale: float = 1.0) -> Rendered:
        """The sample with other loss weights.

        per: ``token``, unchanged; ``sample``, divided by their sum, so that every sample counts the same; ``sqrt``,
        divided by the root of their sum (the square averaging of InternVL 2.5, 2024); ``sqrt_dialogues``, divided by
        the roots of their sum and of the number of dialogues (Molmo2, 2025, published code). Each dialogue of a tree is
        a sample. scale: a further factor.
        """
        if per == "token":
            return self if scale == 1 else replace(self, weights=self.weights * scale)
        shared, *parts = self.weights.split(self.parts)
        totals = (float(part.sum()) or 1.0 for part in parts)
        others = len(parts) if per == "sqrt_dialogues" else 1
        weighed = (part / (total if per == "sample" else (total * others) ** 0.5) for part, total in zip(parts, totals))
        return replace(self, weights=torch.cat([shared, *weighed]) * scale)

    @property
    def length(self) -> SampleLength:
        return SampleLength.of(len(self), self.media)

    def __len__(self) -> int:
        return len(self.input_ids)
