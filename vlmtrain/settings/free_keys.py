"""Keys that may differ between two commands for the same run, or for the same ablation."""

from __future__ import annotations

# They change how fast a run is or what it keeps, but no number in it.
_NO_RESULT = {"workers", "wandb", "wandb_project", "wandb_model", "collective_timeout"}
_NO_RESULT_IN_STAGE = {"micro_batch_size", "save_every", "save_every_minutes", "keep_last"}

# They change no update that has been made.
_NO_UPDATE = {
    *("run_dir", "stage", "compile", "modules", "named", "validation"),
    *("on_bad_sample", "bad_sample_limit", "bad_steps.in_a_row"),  # a bad sample that stops a run has skipped nothing
    *("features.cache", "features.max_gb"),
}
_NO_UPDATE_IN_STAGE = {"expected", "keep_best", "validate_every", "validation"}


def changes_no_result(key: str) -> bool:
    """Whether the jobs of an ablation stay comparable when this dotted key differs between its commands."""
    return _is_among(key, _NO_RESULT, _NO_RESULT_IN_STAGE)


def changes_no_update(key: str) -> bool:
    """Whether a run that has begun may be resumed with another value of this dotted key."""
    return changes_no_result(key) or _is_among(key, _NO_UPDATE, _NO_UPDATE_IN_STAGE)


def _is_among(key: str, keys: set[str], of_stages: set[str]) -> bool:
    first, _, rest = key.partition(".")
    in_stage = rest.partition(".")[2].partition(".")[0]
    return first in keys or key in keys or (first == "stages" and in_stage in of_stages)
