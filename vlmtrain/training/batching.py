"""Splits the batch of a stage into the micro-batches of each rank, padded or packed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..data.image_groups import image_groups
from ..data.layouts import Batching, PackedBatching, PaddedBatching
from ..data.lengths import open_lengths
from ..data.mixture import Mixture
from ..data.processor import Processor
from ..evaluation.progress import ValidationProgress
from ..model.attention import segments_obstacle
from ..model.varlen import has_kernel
from ..objectives import OBJECTIVES
from ..settings import AUTO, Run, Stage
from .log import logger


def keeps_samples_apart(run: Run, stage: Stage, parts: Mapping[str, nn.Module], device: torch.device) -> bool:
    """Whether the language model of a stage reads rows of several samples, which do not see each other."""
    if stage.layout == "packed" or stage.padding is False:
        return True
    chosen = run.llm.attn_implementation
    replaced = chosen is None or chosen.startswith("flash_attention")
    if stage.padding is True or not OBJECTIVES[stage.objective].reads_packed or not replaced:
        return False
    llm = parts["llm"]
    return segments_obstacle(llm) is None and (device.type != "cuda" or _has_kernel(llm, device))


def _has_kernel(llm: nn.Module, device: torch.device) -> bool:
    """Whether a GPU computes the attention of all samples of a row at once, and not one after the other."""
    config, dtype = llm.config.get_text_config(), next(llm.parameters()).dtype
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dropout = getattr(config, "attention_dropout", 0.0)
    return has_kernel(torch.empty(head, dtype=dtype, device=device), dropout)


def build_batching(
    source: Mixture, processor: Processor, stage: Stage, world_size: int, workers: int, joined: bool = False
) -> Batching:
    """Build the batching of a stage. Raises ValueError if the batch cannot be split over the ranks.

    workers: processes of each rank that load data. joined: see `PaddedBatching`.
    """
    stage = replace(stage, micro_batch_size=_micro_batch_size(stage))
    is_packed = stage.layout == "packed"
    # a process that loads all samples of a step itself needs no lengths in advance
    alone = world_size == 1 and (workers < 2 or not is_packed)
    lengths = None if alone or stage.share_images else open_lengths(source, processor)
    if is_packed:
        if stage.share_images:
            logger.info(f"stage {stage.name}: looking up the images of {len(source):,} records")
            progress = ValidationProgress(_say, unit="record")
            groups = image_groups(source, partial(progress, f"stage {stage.name}: images"))
            source = source if groups is None else source.keeping_together(groups)
        sizes = (stage.batch_size, stage.micro_batch_size, world_size)
        options = (stage.pack_by == "source", lengths, stage.loss_per, stage.share_images)
        return PackedBatching(source, processor, *sizes, *options)
    sizes = (stage.batch_size, *split_batch(stage, world_size))
    return PaddedBatching(source, processor, *sizes, lengths, stage.loss_per, joined)


def _say(text: str) -> None:
    """Write a line on any rank: only one of them reads the files, which need not be the one that logs."""
    print(text, file=sys.stderr, flush=True)


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
