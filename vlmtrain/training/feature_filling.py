"""``vlmtrain features``: computes the features of a frozen encoder for the images of a stage before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.loader import StepStream, step_loader
from ..data.sources import build_source
from ..model.parts import module_state, state_hash
from ..model.vision import VisionEncoder
from ..objectives import OBJECTIVES
from ..settings import Run, Stage
from .assembly import build_parts, build_skeleton, build_tokenizer
from .batching import build_batching
from .checks import check_run
from .feature_cache import FeatureCache
from .processing import build_processor, image_size_of
from .workers import Workers


@dataclass
class Filled:
    """Result for the first epoch of a stage. known: items already cached. computed: items added to the cache."""

    known: int
    computed: int
    problems: list[str]


def fill_cache(run: Run, show_progress: bool) -> dict[str, Filled]:
    """Fill ``features.cache`` with the features that training would look up in its first epoch, stage by stage.

    This excludes stages that train their encoder, and stages whose encoder is trained by an earlier stage of the same
    run. Raises ValueError if no stage is left.
    """
    check_run(run, world_size=1)
    if run.features.cache == "off":
        raise ValueError("features.cache=off: expected a folder for the features")
    possible = [stage for stage in run.wanted if _knows_encoder(run, stage)]
    if not possible:
        names = ", ".join(stage.name for stage in run.wanted)
        raise ValueError(
            f"no features can be computed in advance: in each of the stages {names}, the encoder is absent or is "
            "trained in this run by that stage or an earlier one. If an earlier stage has already trained it, set "
            "stage=NAME init_from=MODEL_DIR"
        )
    return {stage.name: _fill(run, stage, show_progress) for stage in possible}


def _knows_encoder(run: Run, stage: Stage) -> bool:
    """Whether the encoder weights of a stage are known before training: no stage up to it trains them in this run."""
    first = stage.position if run.stage and run.init_from else 0
    return "vision" in stage.parts and not any(each.trains("vision") for each in run.up_to(stage)[first:])


def _fill(run: Run, stage: Stage, show_progress: bool) -> Filled:
    tokenizer = build_tokenizer(run)
    skeleton = build_skeleton(run, stage, tokenizer)
    processor = build_processor(run, stage, skeleton, OBJECTIVES[stage.objective], tokenizer)
    source = build_source(run.data.split(stage.data), image_size_of(skeleton), run.seed)
    workers = Workers(run.workers).count
    batching = build_batching(source, processor, stage, 1, workers)
    steps = min(stage.max_steps or batching.steps_per_epoch, batching.steps_per_epoch)
    encoders = _encoder(run, stage, tokenizer).encoders.values()
    caches = [FeatureCache.of(run.features, encoder, state_hash(module_state(encoder))) for encoder in encoders]
    device, dtype = next(next(iter(encoders)).parameters()).device, caches[0].dtype
    stream = StepStream(batching, source, processor.reading(*(cache.files for cache in caches)), 0, 1, 0, steps)
    loader = step_loader(stream, workers, pin_memory=device.type == "cuda")
    problems: list[str] = []
    with (
        torch.no_grad(),
        tqdm(total=steps, unit="step", desc=stage.name, disable=not show_progress, leave=False) as bar,
    ):
        for data in loader:
            for batch in data.micro_batches:
                visual = batch.visual.to(device, dtype)
                for cache, pixels, cached in zip(caches, visual.pixels, visual.cached):
                    cache(pixels, cached)
            problems += [bad.problem for bad in data.bad]
            bar.update()
    return Filled(sum(cache.hits for cache in caches), sum(cache.misses for cache in caches), problems)


def _encoder(run: Run, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> VisionEncoder:
    """Build only the encoder that the stage starts from."""
    previous = Path(run.init_from) if run.init_from else None
    encoder = build_parts(run, stage, previous, tokenizer, only=("vision",))["vision"].eval()
    resized = run.resized_by(stage)
    if resized is not None:
        encoder.resize(resized.image_size, f"{resized.prefix}.image_size")
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")
