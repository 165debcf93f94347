"""Runs a model on batches of held-out conversations.

images -> features -> one forward pass over the conversations -> losses
                                                              -> keys and values, from which answers are generated
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..batch import Batch
from ..connectors import Features, VisionFeatures
from ..data.processor import Processor
from ..distributed.world import World
from ..model import VLMWrapper
from ..model.vision.base import packed, rows_of, stacked
from ..visual import Size, Visual
from .generation import Likelihood, Prefixes, generate, likelihoods
from .held_out import HeldOutBatch, Rows
from .scores import Answer

MOST_BLANKS = 64
"""Number of sizes of which the features of a blanked image are kept."""


class Told(NamedTuple):
    """Results for one conversation: its summed cross-entropy, the weight of its targets, and the answers.

    demonstrations: the ids of those before it.
    """

    loss: float
    weight: float
    answers: tuple[Answer, ...] = ()
    demonstrations: tuple[str, ...] = ()


class Reader:
    """Runs a model on batches of held-out conversations. Every rank has its own, and all make the same calls.

    An image is encoded once for everything that is asked about it; a blanked image, which has the mean color in every
    pixel, once for each size. check_stop: called before each batch of prompts or choices. generation: options for
    ``generate``.
    """

    def __init__(
        self,
        model: VLMWrapper,
        processor: Processor,
        world: World,
        dtype: torch.dtype,
        check_stop: Callable[[], None],
        **generation,
    ):
        self.model, self.processor, self.world, self.dtype = model, processor, world, dtype
        self.check_stop, self.generation = check_stop, generation
        self.shares_prefixes = Prefixes.serve(model)
        self.is_native = processor.geometry is not None and processor.geometry.fit == "native"
        self.blanks: dict[Size, VisionFeatures] = {}

    def read(self, held: HeldOutBatch, views: Sequence[bool]) -> list[list[Told]]:
        """Each view's reading of each conversation; a view is True if images are blanked."""
        alone = not all(Prefixes.allow(rows.batch) for rows in held.prompts)
        alone |= self.shares_prefixes and not Prefixes.fit(self.model.llm, held.batch)
        prompts, choices, alone = map(int, self.world.max([len(held.prompts), len(held.choices), float(alone)]))
        batch = self._moved(held.batch)
        asked, offered = (
            [rows._replace(batch=self._moved(rows.batch)) for rows in self._extended(found, count)]
            for found, count in ((held.prompts, prompts), (held.choices, choices))
        )
        shares = self.shares_prefixes and bool(asked) and not alone
        return [list(self._read(held, batch, asked, offered, shares, blind)) for blind in views]

    def _read(
        self,
        held: HeldOutBatch,
        batch: Batch,
        asked: list[Rows],
        offered: list[Rows],
        shares_prefixes: bool,
        blind: bool,
    ) -> Iterator[Told]:
        images = self._images(batch.visual, blind)
        prefixes = Prefixes(self.model) if shares_prefixes else None
        losses = self._losses(batch, self._joined(images), prefixes)
        if prefixes is not None and not prefixes.are_complete:
            prefixes = None
        said = self._answers(asked, images, prefixes)
        likely = self._likelihoods(offered, images)
        for number, (questions, before, loss, weight) in enumerate(
            zip(held.questions, held.demonstrations, losses.tolist(), batch.weights.sum(1).tolist())
        ):
            answers = (
                replace(
                    question,
                    prediction=said[number, turn],
                    likelihoods=tuple(likely[number, turn, i] for i in range(len(question.grading.choices))),
                )
                for turn, question in questions.items()
            )
            yield Told(loss, weight, tuple(answers), before)

    def _losses(self, batch: Batch, features: Features | None, prefixes: Prefixes | None) -> torch.Tensor:
        """Summed cross-entropy of each row, in float64."""
        trained, (height, width) = batch.trained, batch.input_ids.shape
        logits = self.model(batch, features, keep=trained.positions, cache=prefixes and prefixes.cache).float()
        losses = F.cross_entropy(logits, trained.ids, reduction="none") * trained.weights
        sums = torch.zeros(height, dtype=torch.double, device=self.world.device)
        return sums.index_add_(0, trained.positions // width, losses.double())

    def _answers(
        self, asked: Sequence[Rows], images: list[VisionFeatures] | None, prefixes: Prefixes | None
    ) -> dict[tuple[int, int], str]:
        """Greedy answers by conversation and turn."""
        found = {}
        for number, rows in enumerate(asked, 1):
            self.check_stop()
            if prefixes is None:
                features = self._joined(images, rows.items)
                ids = generate(self.model, self.processor, rows.batch, features, **self.generation)
            else:
                places, is_last = rows.conversations or [0], number == len(asked)
                ids = prefixes.generate(self.processor, rows.batch, places, is_last, **self.generation)
            for row, conversation, turn in zip(ids, rows.conversations, rows.turns):
                found[conversation, turn] = self.processor.renderer.decode(row)
        return found

    def _likelihoods(
        self, offered: Sequence[Rows], images: list[VisionFeatures] | None
    ) -> dict[tuple[int, int, int], Likelihood]:
        """Likelihood of each choice as the last answer of its conversation, by conversation, turn and choice."""
        found = {}
        for rows in offered:
            self.check_stop()
            each = likelihoods(self.model, rows.batch, rows.starts, self._joined(images, rows.items))
            found |= dict(zip(zip(rows.conversations, rows.turns, rows.choices), each))
        return found

    def _images(self, visual: Visual | None, blind: bool) -> list[VisionFeatures] | None:
        """Features of each item; without items, of a stand-in. None if the model has no images."""
        if visual is None or self.model.connector is None:
            return None
        if not blind:
            return rows_of(self.model.encode(visual))
        sizes = [tuple(item.pixels[0]) for item in visual.items] or [self.processor.geometry.smallest]
        missing = sorted(set(sizes) - self.blanks.keys())
        calls = int(self.world.max([len(missing)])[0])
        if calls:
            if len(self.blanks) > MOST_BLANKS:
                self.blanks = {size: self.blanks[size] for size in set(sizes) & self.blanks.keys()}
            shown = map(self.processor.geometry.sizes, missing or sizes)
            each = [
                [torch.zeros(3, *size, dtype=self.dtype, device=self.world.device) for size in column]
                for column in zip(*shown)
            ]
            pixels = tuple(tuple(images) if self.is_native else torch.stack(images) for images in each)
            chunks = int(self.world.max([self.processor.chunks(len(pixels[0]))])[0])
            gray = visual._replace(pixels=pixels, calls=calls, chunks=chunks)
            self.blanks |= zip(missing, rows_of(self.model.encode(gray)))
        return [self.blanks[size] for size in sizes]

    def _joined(self, images: list[VisionFeatures] | None, items: Sequence[int] | None = None) -> Features | None:
        """The features of all items, or of those that some rows show; of the first one if they show none."""
        if images is None:
            return None
        chosen = images if items is None else [images[item] for item in items] or images[:1]
        return packed(chosen) if self.is_native else stacked(chosen)

    def _extended(self, found: Sequence[Rows], count: int) -> list[Rows]:
        """As many batches as the rank with the most has."""
        empty = Rows(self.processor.collate([], rows=1), [], [], [], [], [])
        return [*found, *[empty] * (count - len(found))]

    def _moved(self, batch: Batch) -> Batch:
        """The batch on this rank's device, with the numbers of calls that all ranks make."""
        if self.is_native or self.processor.encoder_batch_size:  # otherwise, each rank makes one call
            visual = batch.visual
            calls, chunks = map(int, self.world.max([visual.calls, visual.chunks]))
            batch = batch._replace(visual=visual._replace(calls=calls, chunks=chunks))
        return batch.to(self.world.device, self.dtype)
