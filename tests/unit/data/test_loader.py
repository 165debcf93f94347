"""The order of data depends only on seed and position, not on ranks, micro-batches and workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

import pytest
import torch
from PIL import Image

from vlmtrain.batch import Batch
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.layouts import BadRecord, PaddedBatching
from vlmtrain.data.loader import StepData, StepStream, step_loader
from vlmtrain.data.mixture import Mixture
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import BadSample, Conversation, Turn

SIZE, BATCH, PICTURE_TOKENS = 30, 8, 3  # four steps per epoch, the last one with six samples
STEPS = 4


class Flat:
    """An image of one gray value, which identifies its sample."""

    def __init__(self, value: int):
        self.value = value

    def load(self) -> Image.Image:
        return Image.new("RGB", (4, 4), (self.value,) * 3)


class Numbered:
    """Sample i answers "i"; every third has an image; lengths differ; those in `bad` are broken."""

    def __init__(self, bad: tuple[int, ...] = ()):
        self.bad = bad

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Conversation:
        if index in self.bad:
            raise BadSample(f"sample {index}: broken")
        with_picture = index % 3 == 0
        question = ("<image>" if with_picture else "") + "What" * (1 + index % 5)
        turns = (Turn("user", question), Turn("assistant", f"number {index}"))
        return Conversation(f"sample {index}", turns, (Flat(index),) if with_picture else ())


@pytest.fixture
def processor(tokenizer) -> Processor:
    geometry = Geometry((4, 4), "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), tokens=PICTURE_TOKENS)
    return Processor(tokenizer, geometry, "chat", max_length=200)


def batching_of(
    processor: Processor, micro: int = 2, world: int = 1, bad: tuple[int, ...] = (), seed: int = 0
) -> PaddedBatching:
    return PaddedBatching(Mixture({"all": Numbered(bad)}, seed=seed), processor, BATCH, BATCH // (micro * world), micro)


def stream(processor: Processor, micro: int = 2, rank: int = 0, world: int = 1, **options) -> StepStream:
    first, last = options.pop("first", 0), options.pop("last", STEPS)
    batching = batching_of(processor, micro, world, **options)
    return StepStream(batching, batching.mixture, processor, rank, world, first, last)


def steps(processor: Processor, *arguments, **options) -> list[StepData]:
    return list(stream(processor, *arguments, **options))


def drawn(batching: PaddedBatching, step: int) -> list[int]:
    return [batching.mixture.draw(position) for position in batching.positions(step)]


def rows(data: StepData) -> Counter:
    """The content of a step: each row as (tokens, targets, value of the image)."""
    out = Counter()
    for batch in data.micro_batches:
        pictures = iter(batch.visual.pixels[0] if batch.visual.items else ())
        for row in range(len(batch.input_ids)):
            length = int(batch.lengths[row])
            if not batch.weights[row].any():
                continue
            shows = batch.visual.mask[row].any()
            picture = int(next(pictures)[0, 0, 0]) if shows else None
            out[
                (tuple(batch.input_ids[row, :length].tolist()), tuple(batch.targets[row, :length].tolist()), picture)
            ] += 1
        assert next(pictures, None) is None
    return out


def answers(processor: Processor, data: StepData) -> list[int]:
    decode = processor.renderer.decode
    texts = [decode([target for target in targets if target >= 0]) for _, targets, _ in rows(data)]
    return sorted(int(text.removeprefix("number ")) for text in texts)


def test_every_sample_comes_once_per_epoch(processor):
    batching = batching_of(processor)
    assert batching.steps_per_epoch == STEPS
    for epoch in range(3):
        numbers = [drawn(batching, epoch * STEPS + i) for i in range(STEPS)]
        assert sorted(chain(*numbers)) == list(range(SIZE))
        assert [len(step) for step in numbers] == [BATCH, BATCH, BATCH, SIZE - 3 * BATCH]


def add_up(shares: Sequence[StepData], whole: StepData) -> None:
    for field in ("weight", "samples", "tokens", "image_tokens", "target_tokens"):
        assert sum(getattr(share, field) for share in shares) == getattr(whole, field), field


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_has_the_same_samples_however_it_is_distributed(processor, world, micro):
    whole = steps(processor, BATCH, last=STEPS + 1)
    ranks = [steps(processor, micro, rank, world, last=STEPS + 1) for rank in range(world)]
    for reference, *shares in zip(whole, *ranks):
        assert sum((rows(share) for share in shares), Counter()) == rows(reference)
        assert {len(share.micro_batches) for share in shares} == {BATCH // (micro * world)}
        add_up(shares, reference)
        assert all(len(batch.input_ids) <= micro for share in shares for batch in share.micro_batches)


def test_the_short_last_step_is_filled_with_rows_without_weight(processor):
    shares = [steps(processor, 1, rank, 4)[STEPS - 1] for rank in range(4)]
    assert [share.samples for share in shares] == [2, 2, 1, 1]
    for share in shares:
        assert len(share.micro_batches) == 2
        weights = [float(batch.weights.sum()) for batch in share.micro_batches]
        assert sum(weight > 0 for weight in weights) == share.samples
        assert all(len(batch.visual.pixels[0]) > 0 for batch in share.micro_batches)


def test_counts_are_those_of_the_tensors(processor):
    for data in steps(processor):
        full = [batch for batch in data.micro_batches if batch.weights.any()]
        assert data.tokens == sum(int(batch.lengths.sum()) for batch in full)
        assert data.padded_tokens == sum(batch.input_ids.numel() for batch in data.micro_batches)
        pictures = [batch for batch in full if batch.visual.items]
        assert data.image_tokens == sum(int(batch.visual.mask.sum()) for batch in pictures)
        assert data.image_tokens == sum(PICTURE_TOKENS * len(batch.visual.pixels[0]) for batch in pictures)
        assert data.target_tokens == sum(int((batch.targets >= 0).sum()) for batch in full)
        assert data.weight == sum(float(batch.weights.sum()) for batch in full) == data.target_tokens
        assert data.samples == sum(rows(data).values()) and data.bad == [] and data.drawn == [data.samples]


def same_batches(batches: list[Batch], others: list[Batch]) -> None:
    def split(batch: Batch) -> tuple[tuple, Batch]:
        visual = batch.visual
        named = batch.ids, visual.items, visual.placements, visual.cached
        return named, batch._replace(ids=(), visual=visual._replace(items=(), placements=(), cached=()))

    (names, tensors), (other_names, other_tensors) = (zip(*map(split, some)) for some in (batches, others))
    assert names == other_names
    torch.testing.assert_close(tensors, other_tensors, rtol=0, atol=0)


def same(one: StepData, other: StepData) -> None:
    same_batches(one.micro_batches, other.micro_batches)
    assert one[1:] == other[1:]


def same_when_resumed(stream: Callable[..., StepStream], steps: int, workers: int) -> None:
    """Steps after a stop equal those without it, wherever it is. stream: from `first` and `cursor`; sample 3 is bad."""
    everything = list(step_loader(stream(), workers, pin_memory=False))
    assert 3 in [record.index for data in everything for record in data.bad]
    for stop in range(1, steps):
        rest = stream(first=stop, cursor=everything[stop - 1].cursor)
        for one, other in zip(everything[stop:], step_loader(rest, workers, pin_memory=False), strict=True):
            same(one, other)


def test_workers_change_nothing(processor):
    def read(workers: int) -> list[StepData]:
        return list(step_loader(stream(processor, bad=(4,), last=STEPS + 1), workers, pin_memory=False))

    alone, helped = read(0), read(2)
    assert len(alone) == len(helped) == STEPS + 1
    for one, other in zip(alone, helped):
        same(one, other)


def test_starting_late_equals_skipping(processor):
    everything, late = steps(processor, last=2 * STEPS), steps(processor, first=STEPS - 1, last=2 * STEPS)
    assert len(late) == STEPS + 1
    for one, other in zip(everything[STEPS - 1 :], late):
        same(one, other)


def test_rows_of_a_micro_batch_have_similar_lengths(processor):
    """Longest minus shortest row, summed over micro-batches of both ranks, is minimal: sorted rows are split."""
    both = [steps(processor, 2, rank, 2) for rank in range(2)]
    for shares in zip(*both):
        together = [
            sorted(int(n) for share in shares for n in share.micro_batches[i].lengths) for i in range(len(shares))
        ]
        assert sorted(chain(*together)) == list(chain(*together))


@pytest.mark.parametrize("world", [1, 2])
def test_bad_samples_are_reported_skipped_and_not_replaced(processor, world):
    bad = (4, 11, 12)
    batching = batching_of(processor, bad=bad)
    ranks = [steps(processor, 2, rank, world, bad=bad) for rank in range(world)]
    reported = []
    for step, shares in enumerate(zip(*ranks)):
        trained = sorted(chain(*(answers(processor, share) for share in shares)))
        assert trained == sorted(set(drawn(batching, step)) - set(bad))
        assert {len(share.micro_batches) for share in shares} == {BATCH // (2 * world)}
        found = [record for share in shares for record in share.bad]
        assert [batching.mixture.draw(record.position) for record in found] == [record.index for record in found]
        reported += found
    assert sorted((r.index, r.problem) for r in reported) == [(i, f"sample {i}: broken") for i in bad]


def test_an_image_that_does_not_open_is_reported_by_the_rank_that_needs_it(processor, monkeypatch):
    def load(self) -> Image.Image:
        if self.value == 6:
            raise BadSample("no image")
        return Image.new("RGB", (4, 4), (self.value,) * 3)

    monkeypatch.setattr(Flat, "load", load)
    ranks = [steps(processor, 2, rank, 2) for rank in range(2)]
    reported = [record for share in chain(*ranks) for record in share.bad]
    assert [(type(r), r.index, r.problem) for r in reported] == [(BadRecord, 6, "sample 6: no image")]
    trained = sorted(chain(*(answers(processor, share) for share in chain(*ranks))))
    assert trained == [i for i in range(SIZE) if i != 6]


def test_a_step_of_bad_samples_only_still_has_its_micro_batches(processor):
    data = steps(processor, bad=tuple(range(SIZE)))[0]
    assert len(data.bad) == BATCH and data.samples == data.weight == data.tokens == 0
    assert [batch.input_ids.shape for batch in data.micro_batches] == [(1, 1)] * 4
    assert all(not batch.weights.any() and not batch.visual.items for batch in data.micro_batches)
