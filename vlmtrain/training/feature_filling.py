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
from ..model.vision import PatchVision, VisionEncoder
from ..objectives import OBJECTIVES
from ..settings import Run, SeveralOptions, Stage
from .assembly import build_parts, build_skeleton, build_tokenizer
from .batching import build_batching
from .checks import check_run
from .feature_cache import FeatureCache
from .processing import build_processor, image_size_of
from .workers import Workers


@dataclass
class Filled:
    """Result for the first epoch of a stage. known: items already cached. computed: items added to the cache.

    An item counts once for each encoder.
    """

    known: int
    computed: int
    problems: list[str]


def fill_cache(run: Run, show_progress: bool) -> dict[str, Filled]:
    """Fill ``features.cache`` with the features that training would look up in its first epoch, stage by stage.

    This excludes encoders that a stage, or an earlier stage of the same run, trains. Raises ValueError if no stage is
    left.
    """
    check_run(run, world_size=1)
    if run.features.cache == "off":
        raise ValueError("features.cache=off: expected a folder for the features")
    possible = [stage for stage in run.wanted if _known_encoders(run, stage)]
    if not possible:
        names = ", ".join(stage.name for stage in run.wanted)
        raise ValueError(
            f"no features can be computed in advance: in each of the stages {names}, the encoder is absent, has no "
            "weights (vision=patches) or is trained in this run by that stage or an earlier one. If an earlier stage "
            "has already trained it, set stage=NAME init_from=MODEL_DIR"
        )
    return {stage.name: _fill(run, stage, show_progress) for stage in possible}


def _known_encoders(run: Run, stage: Stage) -> list[str]:
    """Names of the encoders whose weights are known before training: no stage up to this one trains them in this run.

    The only encoder has an empty name. Raw patches are none.
    """
    if "vision" not in stage.parts:
        return []
    first = stage.position if run.stage and run.init_from else 0
    several = isinstance(run.vision, SeveralOptions)
    encoders = {name: each.options for name, each in run.vision.encoders.items()} if several else {"": run.vision}
    names = [name for name, options in encoders.items() if options.provider != PatchVision.provider]
    trained: set[str] = set()
    for each in run.up_to(stage)[first:]:
        matches = [group.match for group in each.groups if group.part == "vision" and group.lr is not None]
        chosen = {match.split(".")[1] if "." in match else "" for match in matches}
        trained |= chosen if chosen <= set(names) and "vision" not in each.rates else set(names)
    return [name for name in names if name not in trained]


def _fill(run: Run, stage: Stage, show_progress: bool) -> Filled:
    tokenizer = build_tokenizer(run)
    skeleton = build_skeleton(run, stage, tokenizer)
    processor = build_processor(run, stage, skeleton, OBJECTIVES[stage.objective], tokenizer)
    source = build_source(run.data.split(stage.data), image_size_of(skeleton), run.seed)
    workers = Workers(run.workers).count
    batching = build_batching(source, processor, stage, 1, workers)
    steps = min(stage.max_steps or batching.steps_per_epoch, batching.steps_per_epoch)
    vision, known = _encoder(run, stage, tokenizer), _known_encoders(run, stage)
    caches = {name: _cache(run, vision.encoders[name]) for name in known}
    device, dtype = next(vision.parameters()).device, next(vision.parameters()).dtype
    ordered = [caches.get(name) for name in vision.encoders]
    reader = processor.reading(*(cache and cache.files for cache in ordered))
    stream = StepStream(batching, source, reader, 0, 1, 0, steps)
    loader = step_loader(stream, workers, pin_memory=device.type == "cuda")
    problems: list[str] = []
    with (
        torch.no_grad(),
        tqdm(total=steps, unit="step", desc=stage.name, disable=not show_progress, leave=False) as bar,
    ):
        for data in loader:
            for batch in data.micro_batches:
                visual = batch.visual.to(device, dtype)
                for cache, pixels, cached in zip(ordered, visual.pixels, visual.cached):
                    if cached is not None:
                        cache(pixels, cached)
            problems += [bad.problem for bad in data.bad]
            bar.update()
    return Filled(*(sum(column) for column in zip(*((c.hits, c.misses) for c in caches.values()))), problems)


def _cache(run: Run, encoder: VisionEncoder) -> FeatureCache:
    return FeatureCache.of(run.features, encoder, state_hash(module_state(encoder)))


def _encoder(run: Run, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> VisionEncoder:
    """Build only the encoder that the stage starts from."""
    previous = Path(run.init_from) if run.init_from else None
    encoder = build_parts(run, stage, previous, tokenizer, only=("vision",))["vision"].eval()
    resized = run.resized_by(stage)
    if resized is not None:
        encoder.resize(resized.image_size, f"{resized.prefix}.image_size")
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")
