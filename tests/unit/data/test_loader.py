"""The order of data: a function of seed and position, whatever the ranks, micro-batches and workers."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch
from PIL import Image

from vlmtrain.data.loader import StepData, StepDataset, StepOrder, step_loader
from vlmtrain.data.processor import Geometry, Processor
from vlmtrain.data.records import BadSample, Conversation, Turn

SIZE, BATCH, PICTURE_TOKENS = 30, 8, 3  # four steps an epoch, the last one of six samples
STEPS = 4


class Flat:
    """A picture of one grey value, which tells whose it is."""

    def __init__(self, value: int):
        self.value = value

    def load(self) -> Image.Image:
        return Image.new("RGB", (4, 4), (self.value,) * 3)


class Numbered:
    """Sample i answers "i"; every third has a picture; lengths differ; those in `bad` are broken."""

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


def dataset(processor: Processor, micro: int = 2, rank: int = 0, world: int = 1, **options) -> StepDataset:
    source = Numbered(options.pop("bad", ()))
    order = StepOrder(SIZE, BATCH, options.pop("seed", 0))
    return StepDataset(source, processor, order, micro_batch_size=micro, rank=rank, world_size=world)


def rows(data: StepData) -> Counter:
    """What a step trains on: each row as (its tokens, its targets, its picture's value)."""
    out = Counter()
    for batch in data.micro_batches:
        pictures = iter(batch.images if batch.is_image is not None else ())
        for row in range(len(batch.input_ids)):
            length = int(batch.lengths[row])
            if not batch.weights[row].any():
                continue
            shows = batch.is_image is not None and batch.is_image[row].any()
            picture = round(float(next(pictures)[0, 0, 0]) * 255) if shows else None
            out[
                (tuple(batch.input_ids[row, :length].tolist()), tuple(batch.targets[row, :length].tolist()), picture)
            ] += 1
        assert next(pictures, None) is None
    return out


def answers(processor: Processor, data: StepData) -> list[int]:
    decode = processor.renderer.decode
    texts = [decode([target for target in targets if target >= 0]) for _, targets, _ in rows(data)]
    return sorted(int(text.removeprefix("number ")) for text in texts)


@pytest.mark.parametrize("size, batch_size", [(30, 8), (32, 8), (5, 8), (1, 1)])
def test_every_sample_comes_once_an_epoch(size, batch_size):
    order = StepOrder(size, batch_size, seed=3)
    assert order.steps_per_epoch == -(-size // batch_size)
    for epoch in range(3):
        steps = [order.samples(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert sorted(chain(*steps)) == list(range(size))
        assert all(len(step) == batch_size for step in steps[:-1])


def test_the_order_depends_on_seed_and_epoch_only():
    def epoch(seed: int, number: int, batch_size: int = BATCH) -> list[int]:
        order = StepOrder(SIZE, batch_size, seed)
        first = number * order.steps_per_epoch
        return list(chain(*(order.samples(first + i) for i in range(order.steps_per_epoch))))

    torch.manual_seed(1)
    here = epoch(0, 0)
    torch.manual_seed(2)
    assert here == epoch(0, 0) == epoch(0, 0, batch_size=5)
    everything = [epoch(seed, number) for seed in range(4) for number in range(3)]
    assert len({tuple(order) for order in everything}) == 12
    assert all(order != sorted(order) for order in everything)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_holds_the_same_samples_however_it_is_dealt(processor, world, micro):
    whole = dataset(processor, micro=BATCH)
    for step in range(STEPS + 1):
        reference = whole[step]
        shares = [dataset(processor, micro, rank, world)[step] for rank in range(world)]
        assert sum((rows(share) for share in shares), Counter()) == rows(reference)
        assert {len(share.micro_batches) for share in shares} == {BATCH // (micro * world)}
        for field in ("weight", "samples", "tokens", "image_tokens", "target_tokens"):
            assert sum(getattr(share, field) for share in shares) == getattr(reference, field), field
        assert all(len(batch.input_ids) <= micro for share in shares for batch in share.micro_batches)


def test_the_short_last_step_is_topped_up_with_rows_of_no_weight(processor):
    shares = [dataset(processor, 1, rank, 4)[STEPS - 1] for rank in range(4)]
    assert [share.samples for share in shares] == [2, 2, 1, 1]
    for share in shares:
        assert len(share.micro_batches) == 2
        weights = [float(batch.weights.sum()) for batch in share.micro_batches]
        assert sum(weight > 0 for weight in weights) == share.samples
        assert all(batch.images is not None for batch in share.micro_batches)


def test_counts_are_those_of_the_tensors(processor):
    for data in (dataset(processor)[step] for step in range(STEPS)):
        full = [batch for batch in data.micro_batches if batch.weights.any()]
        assert data.tokens == sum(int(batch.lengths.sum()) for batch in full)
        assert data.positions == sum(batch.input_ids.numel() for batch in data.micro_batches)
        pictures = [batch for batch in full if batch.is_image is not None]
        assert data.image_tokens == sum(int(batch.is_image.sum()) for batch in pictures)
        assert data.image_tokens == sum(PICTURE_TOKENS * len(batch.images) for batch in pictures)
        assert data.target_tokens == sum(int((batch.targets >= 0).sum()) for batch in full)
        assert data.weight == sum(float(batch.weights.sum()) for batch in full) == data.target_tokens
        assert data.samples == sum(rows(data).values()) and data.bad == []


def same(one: StepData, other: StepData) -> None:
    torch.testing.assert_close(one.micro_batches, other.micro_batches, rtol=0, atol=0)
    assert one[1:] == other[1:]


def test_workers_change_nothing(processor):
    data = dataset(processor, bad=(4,))
    alone = list(step_loader(data, 0, STEPS + 1, workers=0, pin_memory=False))
    helped = list(step_loader(data, 0, STEPS + 1, workers=2, pin_memory=False))
    assert len(alone) == len(helped) == STEPS + 1
    for one, other in zip(alone, helped):
        same(one, other)


def test_starting_late_equals_skipping(processor):
    data = dataset(processor)
    everything = list(step_loader(data, 0, 2 * STEPS, workers=0, pin_memory=False))
    late = list(step_loader(data, STEPS - 1, 2 * STEPS, workers=0, pin_memory=False))
    assert len(late) == STEPS + 1
    for one, other in zip(everything[STEPS - 1 :], late):
        same(one, other)


@pytest.mark.parametrize("world", [1, 2])
def test_bad_samples_are_reported_left_out_and_not_replaced(processor, world):
    bad = (4, 11, 12)
    reported = []
    for step in range(STEPS):
        wanted = StepOrder(SIZE, BATCH, 0).samples(step)
        shares = [dataset(processor, 2, rank, world, bad=bad)[step] for rank in range(world)]
        trained = sorted(chain(*(answers(processor, share) for share in shares)))
        assert trained == sorted(set(wanted) - set(bad))
        assert {len(share.micro_batches) for share in shares} == {BATCH // (2 * world)}
        reported += chain(*(share.bad for share in shares))
    assert sorted(reported) == sorted(f"sample {index}: broken" for index in bad)


def test_a_step_of_bad_samples_only_still_has_its_micro_batches(processor):
    data = dataset(processor, bad=tuple(range(SIZE)))[0]
    assert len(data.bad) == BATCH and data.samples == data.weight == data.tokens == 0
    assert [batch.input_ids.shape for batch in data.micro_batches] == [(1, 1)] * 4
    assert all(not batch.weights.any() and batch.is_image is None for batch in data.micro_batches)
