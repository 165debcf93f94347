"""``vlmtrain features``: a frozen encoder's features of a stage's pictures, computed ahead of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from ..data.loader import StepData, StepStream, build_plan, step_loader
from ..data.sources import build_source
from ..model.parts import module_state, state_hash
from ..model.vision import VisionEncoder
from ..objectives import OBJECTIVES
from .assembly import build_parts, build_processor, build_skeleton, build_tokenizer, picture_size, resized_by
from .feature_cache import FeatureCache
from .run import check_settings
from .trainable import training_rates


@dataclass
class Filled:
    """What a stage's first epoch came to. known: views that the cache had; computed: views that it has now."""

    known: int
    computed: int
    problems: list[str]


def fill_cache(settings: DictConfig, show_progress: bool) -> dict[str, Filled]:
    """Write into ``settings.features.cache`` what training would look up in its first epoch, stage by stage.

    Stages that train their encoder have nothing to keep, and neither has one whose encoder an earlier stage of the
    same run is going to train. Raises ValueError if that leaves none.
    """
    check_settings(settings, world_size=1)
    if settings.features.cache == "off":
        raise ValueError("features.cache=off: expected a folder for the features")
    names = [settings.stage] if settings.stage else list(settings.stages)
    possible = [name for name in names if _knows_encoder(settings, name)]
    if not possible:
        raise ValueError(
            f"no features can be computed ahead: {', '.join(names)} train the encoder, have none, or take it from a "
            "stage that trains it first (then stage=NAME init_from=MODEL_DIR says where it is)"
        )
    return {name: _fill(settings, name, show_progress) for name in possible}


def _knows_encoder(settings: DictConfig, name: str) -> bool:
    names = list(settings.stages)
    first = names.index(name) if settings.stage and settings.init_from else 0
    return "vision" in settings.stages[name].parts and not any(
        _trains_encoder(settings, each) for each in names[first : names.index(name) + 1]
    )


def _trains_encoder(settings: DictConfig, name: str) -> bool:
    stage = settings.stages[name]
    moving = [str(group["match"]) for group in stage.groups if group["lr"] is not None]
    return "vision" in (*training_rates(stage, name), *(match.split(".")[0] for match in moving))


def _fill(settings: DictConfig, name: str, show_progress: bool) -> Filled:
    stage = settings.stages[name]
    tokenizer = build_tokenizer(settings)
    skeleton = build_skeleton(settings, name, tokenizer)
    processor = build_processor(settings, name, skeleton, OBJECTIVES[stage.objective], tokenizer)
    processor.names_pictures = True
    source = build_source(settings.data, stage.data, picture_size(skeleton), settings.seed)
    plan = build_plan(source, processor, stage, name, world_size=1)
    steps = min(stage.max_steps or plan.steps_per_epoch, plan.steps_per_epoch)
    encoder = _encoder(settings, name, tokenizer)
    cache = FeatureCache.from_options(settings.features, encoder, state_hash(module_state(encoder)))
    device = next(encoder.parameters()).device
    stream = StepStream(plan, source, processor, 0, 1, 0, steps)
    loader = step_loader(stream, settings.workers, pin_memory=device.type == "cuda")
    problems: list[str] = []
    with torch.no_grad(), tqdm(total=steps, unit="step", desc=name, disable=not show_progress, leave=False) as bar:
        for data in loader:
            for images, keys in _pictures(data):
                cache(images.to(device, cache.dtype), keys)
            problems += [bad.problem for bad in data.bad]
            bar.update()
    return Filled(cache.hits, cache.misses, problems)


def _encoder(settings: DictConfig, name: str, tokenizer) -> VisionEncoder:
    """The encoder that the stage starts from, alone."""
    resized = resized_by(settings, name)
    size = settings.stages[resized].image_size if resized else None
    of_stage = {"parts": ["vision"], "lora": None, "image_size": size}
    alone = OmegaConf.merge(settings, {"stages": {name: of_stage}})
    previous = Path(settings.init_from) if settings.init_from else None
    encoder = build_parts(alone, name, previous, tokenizer)["vision"].eval()
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


def _pictures(data: StepData) -> Iterator[tuple[torch.Tensor, tuple[str, ...]]]:
    for batch in data.micro_batches:
        if batch.keys is not None:
            yield batch.images, batch.keys
