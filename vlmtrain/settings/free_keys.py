"""Keys whose values may differ between two commands for the same run or the same ablation."""

from __future__ import annotations

# These affect the speed of a run or the files it keeps, but not its results.
_NO_RESULT = {"workers", "wandb", "wandb_project", "wandb_model", "collective_timeout"}
_NO_RESULT_IN_STAGE = {"micro_batch_size", "save_every", "save_every_minutes", "keep_last"}

# These do not affect updates that have already been made.
_NO_UPDATE = {
    *("run_dir", "stage", "compile", "modules", "named", "validation"),
    *("on_bad_sample", "bad_sample_limit", "bad_steps.in_a_row"),  # a run stopped by a bad sample has not skipped it
    *("features.cache", "features.max_gb"),
}
_NO_UPDATE_IN_STAGE = {"expected", "keep_best", "validate_every", "validation"}


ADDED = {"data.ignore": [], "data.repair": False}
"""Keys that runs of earlier versions do not have, with the value that behaves as these versions did."""


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
