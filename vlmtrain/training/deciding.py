"""Decides the settings of a stage that are ``auto``, by the memory of the devices."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..distributed.world import World
from ..files import read_object, write_json
from ..objectives import OBJECTIVES
from ..settings import AUTO, Run, Stage
from .assembly import DTYPES, build_skeleton
from .cost.fitting import Fitting
from .cost.stage import measure, sample_tokens
from .log import logger
from .processing import build_geometry, image_controls
from .trainable import freeze, trained_groups

KEYS = ("gradient_checkpointing", "micro_batch_size")


def decided(run: Run, stage: Stage, file: Path, world: World, tokenizer: PreTrainedTokenizerBase) -> Stage:
    """The stage with a value for each setting that is ``auto``, the same on all ranks.

    file: the record of the decision, which a resumed run with the same settings and devices reads.
    """
    if all(getattr(stage, key) != AUTO for key in KEYS):
        return stage
    memory = -int(world.max([-float(_memory(world.device))])[0])
    given = {key: getattr(stage, key) for key in KEYS}
    asked = {"processes": world.size, "memory_bytes": memory, "given": given, "engine": asdict(run.engine)}
    found = None
    if world.is_main:
        record = read_object(file) if file.exists() else {}
        if {key: record.get(key) for key in asked} != asked:
            record = {**asked, **_decide(run, stage, memory, world.size, tokenizer)}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, record)
        found = {key: record[key] for key in KEYS}
        chosen = ", ".join(f"{key}={found[key]}" for key in KEYS if getattr(stage, key) == AUTO)
        needs = f"{record['planned_bytes'] / 2**30:.1f} of {memory / 2**30:.1f} GiB planned"
        logger.info(f"stage {stage.name}: {chosen.lower()} ({needs})")
    found = world.from_main(found)
    return replace(stage, **{key: value for key, value in found.items() if getattr(stage, key) == AUTO})


def _decide(run: Run, stage: Stage, memory: int, processes: int, tokenizer: PreTrainedTokenizerBase) -> dict:
    parts = build_skeleton(run, stage, tokenizer, DTYPES[run.precision])
    groups = trained_groups(stage, parts)
    freeze(parts, groups, checkpointing=False)
    geometry = build_geometry(stage, parts, OBJECTIVES[stage.objective], *image_controls(run))
    (longest,) = measure(parts, groups, stage, geometry, (stage.max_length, stage.max_length // 2))
    fitting = Fitting.of(run, stage, parts, groups, longest, sample_tokens(stage, geometry), processes, run.engine)
    zero_stage = run.engine.used_stage(processes, run.precision == "bf16")
    recompute = fitting.recomputes(stage, zero_stage, memory)
    micro = stage.micro_batch_size
    if micro == AUTO:
        micro = fitting.divisor(max(1, fitting.largest(zero_stage, memory, recompute)))
        micro = None if OBJECTIVES[stage.objective].compares_samples else micro
    planned = fitting.bytes(zero_stage, micro or fitting.share, recompute)
    return {"gradient_checkpointing": recompute, "micro_batch_size": micro, "planned_bytes": planned}


def _memory(device: torch.device) -> int:
    """Bytes of memory of this rank's device; on CPU, its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (words := limit.read_text().strip()).isdigit():
        total = min(total, int(words))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
