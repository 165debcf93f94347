"""Splits the batch of a stage into the micro-batches of each rank, padded or packed."""

from __future__ import annotations

from dataclasses import replace

from ..data.layouts import Batching, PackedBatching, PaddedBatching
from ..data.lengths import open_lengths
from ..data.mixture import Mixture
from ..data.processor import Processor
from ..settings import AUTO, Stage


def build_batching(source: Mixture, processor: Processor, stage: Stage, world_size: int, workers: int) -> Batching:
    """Build the batching of a stage. Raises ValueError if the batch cannot be split over the ranks.

    workers: processes of each rank that load data.
    """
    stage = replace(stage, micro_batch_size=_micro_batch_size(stage))
    is_packed = stage.layout == "packed"
    # a process that loads all samples of a step itself needs no lengths in advance
    alone = world_size == 1 and (workers < 2 or not is_packed)
    lengths = None if alone else open_lengths(source, processor)
    if is_packed:
        sizes = (stage.batch_size, stage.micro_batch_size, world_size)
        return PackedBatching(source, processor, *sizes, stage.pack_by == "source", lengths, stage.loss_per)
    sizes = (stage.batch_size, *split_batch(stage, world_size))
    return PaddedBatching(source, processor, *sizes, lengths, stage.loss_per)


def _micro_batch_size(stage: Stage) -> int | None:
    """The micro-batch size; None if it is not decided yet, as in commands that do not train."""
    return None if stage.micro_batch_size == AUTO else stage.micro_batch_size


def split_batch(stage: Stage, world_size: int) -> tuple[int, int]:
    """Return (accumulation, micro_batch_size) of a stage. Raises ValueError if the batch size is not divisible."""
    batch, micro = stage.batch_size, _micro_batch_size(stage)
    if batch % world_size:
        raise ValueError(f"{stage.prefix}.batch_size={batch} is not a multiple of the {world_size} processes")
    micro = micro or batch // world_size
    if batch % (micro * world_size):
        raise ValueError(
            f"{stage.prefix}.micro_batch_size={micro} times {world_size} processes does not divide "
            f"{stage.prefix}.batch_size={batch}"
        )
    return batch // (micro * world_size), micro
