"""Keys whose values may differ between two commands for the same run or the same ablation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

# These affect the speed of a run or the files it keeps, but not its results.
_NO_RESULT = {"workers", "device_tflops", "loggers", "wandb", "wandb_project", "wandb_model", "collective_timeout"}
_NO_RESULT_IN_STAGE = {
    *("gradient_checkpointing", "micro_batch_size", "padding", "encoder_batch_size"),
    *("save_every", "save_every_minutes", "keep_last"),
}

# These do not affect updates that have already been made.
_NO_UPDATE = {
    *("run_dir", "stage", "compile", "modules", "named", "validation"),
    *("on_bad_sample", "bad_sample_limit", "bad_steps.in_a_row"),  # a run stopped by a bad sample has not skipped it
    *("features.cache", "features.max_gb"),
}
_NO_UPDATE_IN_STAGE = {"expected", "keep_best", "best_metric", "validate_every", "validation"}

_GATED = {"fusion.qk_norm": False, "fusion.gates": "scalar"}  # options of gated cross-attention only

# These did not exist in earlier versions, which behaved as with these values.
_ADDED = {
    **{"data.ignore": [], "data.repair": False, "data.columns.system": None, "data.sides": None},
    **{"data.videos": None, "data.frames_fps": 2},
    **{f"data.columns.{role}": None for role in ("video", "video_start", "video_end")},
    **{
        "fusion.name": "concatenation",
        "fusion.attention": None,
        **_GATED,
        "llm.positions": None,
        "llm.image_frame": None,
        "llm.image_frame_shared": None,
        "llm.image_newline": None,
        "llm.visual_experts": None,
        "device_tflops": None,
    },
    **{
        "vision.scales": None,
        "vision.final_norm": False,
        "data.columns.dialogues": None,
        "boxes.format": None,
        "boxes.frame": None,
    },
    **{"actions.bins": None, "actions.low": None, "actions.high": None, "data.columns.actions": None},
    **{"validation.shots": [0], "validation.shots_from": None, "validation.shots_by": "random"},
}
_ADDED_IN_STAGE = {
    **{"schedule.decay_ratio": 0.1, "early_stopping": None, "best_metric": "loss"},
    **{"optimizer.name": "adamw", "ema": None, "train.fusion": None, "image_pixels": None},
    **{"image_tiles_margin": None, "schedule.min_lr_ratio": 0.0},
    **{"image_tile_style": "llava_next", "loss_per": "token", "padding": True, "share_images": False},
    **{f"video.{key}": None for key in ("fit", "pixels", "pixels_total", "frame_tokens", "positions_per_second")},
    **{"video.fps": 1, "video.frames": 32, "video.sampling": "interval", "video.last": False, "video.pool": "none"},
    **{"video.stride": 1, "video.newline": "none", "video.timestamps": "none", "video.token_budget": None},
    **{"video.time_format": None, "encoder_batch_size": None, "sum_source_losses": False},
}


def with_added(settings: Mapping[str, Any], stages: Iterable[str]) -> dict[str, Any]:
    """Settings by dotted key, with the keys that runs of earlier versions do not have.

    Their values are those that behave as these versions did.
    """
    return {**_added(stages), **settings}


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an earlier version recorded, with the keys that were added since."""
    found = copy.deepcopy(dict(settings))
    added = _added(found["stages"])
    is_gated = found.get("fusion", {}).get("name", "concatenation") != "concatenation"
    for key in ["fusion.attention"] if is_gated else _GATED:  # the former is an option of concatenation only
        del added[key]
    provider = found.get("vision", {}).get("provider")
    if provider in ("several", "patches"):
        del added["vision.scales"]  # of single encoders only
    if provider != "hf":
        del added["vision.final_norm"]  # of Hugging Face's only
    for key, value in added.items():
        *parents, last = key.split(".")
        if parents[:1] != ["data"]:  # formats have different keys, and those that were added are optional
            place = found
            for parent in parents:
                place = place.setdefault(parent, {})
            place.setdefault(last, value)
    return found


def _added(stages: Iterable[str]) -> dict[str, Any]:
    of_stages = {f"stages.{stage}.{key}": value for stage in stages for key, value in _ADDED_IN_STAGE.items()}
    return {**_ADDED, **of_stages}


def changes_no_result(key: str) -> bool:
    """Whether the jobs of an ablation remain comparable if this dotted key differs between its commands."""
    return _is_among(key, _NO_RESULT, _NO_RESULT_IN_STAGE)


def changes_no_update(key: str) -> bool:
    """Whether a run may be resumed with a different value of this dotted key."""
    return changes_no_result(key) or _is_among(key, _NO_UPDATE, _NO_UPDATE_IN_STAGE)


def _is_among(key: str, keys: set[str], of_stages: set[str]) -> bool:
    first, _, rest = key.partition(".")
    in_stage = rest.partition(".")[2].partition(".")[0]
    return first in keys or key in keys or (first == "stages" and in_stage in of_stages)
