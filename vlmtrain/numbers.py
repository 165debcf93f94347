"""Numbers in the settings: of the right kind and within bounds, or an error that names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a key may hold: whole numbers or any, from `least` to `most`; null where it is `optional`."""

    whole: bool
    least: float
    most: float = float("inf")
    optional: bool = False


RUN = {
    "seed": Rule(True, 0),
    "workers": Rule(True, 0),
    "bad_sample_limit.share": Rule(False, 0, 1),
    "bad_sample_limit.in_a_row": Rule(True, 1),
    "collective_timeout": Rule(False, 1),
    "bad_steps.in_a_row": Rule(True, 1),
    "bad_steps.spike": Rule(False, 1, optional=True),
    "features.max_gb": Rule(False, 0),
}
VALIDATION = {
    "validation.samples": Rule(True, 1, optional=True),
    "validation.final_samples": Rule(True, 1, optional=True),
    "validation.batch_size": Rule(True, 1),
    "validation.max_new_tokens": Rule(True, 1),
}
STAGE = {
    "image_tiles_most": Rule(True, 1, optional=True),
    "max_length": Rule(True, 2),
    "epochs": Rule(True, 1),
    "max_steps": Rule(True, 1, optional=True),
    "batch_size": Rule(True, 1),
    "micro_batch_size": Rule(True, 1, optional=True),
    "max_grad_norm": Rule(False, 0, optional=True),
    "save_every": Rule(True, 1, optional=True),
    "save_every_minutes": Rule(False, 0.1, optional=True),
    "keep_last": Rule(True, 1),
    "validate_every": Rule(True, 1, optional=True),
    "optimizer.eps": Rule(False, 0),
    "optimizer.weight_decay": Rule(False, 0),
    "schedule.warmup_ratio": Rule(False, 0, 1),
    "schedule.warmup_steps": Rule(True, 0, optional=True),
    "schedule.min_lr": Rule(False, 0),
    "expected.samples": Rule(True, 1, optional=True),
    "expected.images": Rule(False, 0),
    "expected.text_tokens": Rule(False, 0),
    "expected.answer_share": Rule(False, 0, 1),
}


def check_numbers(settings: Mapping, rules: Mapping[str, Rule], prefix: str = "") -> None:
    """Raise ValueError, naming the key, for a value that breaks its rule. Keys that are absent are not looked at."""
    for key, rule in rules.items():
        found, value = _get(settings, key)
        if found and not _keeps(value, rule):
            kind = "a whole number" if rule.whole else "a number"
            bounds = f"from {rule.least:g}" + (f" to {rule.most:g}" if rule.most < float("inf") else "")
            raise ValueError(
                f"{prefix}{key}={value}: expected {kind} {bounds}" + (", or null" if rule.optional else "")
            )


def _get(settings: Mapping, key: str) -> tuple[bool, Any]:
    value: Any = settings
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False, None
        value = value[name]
    return True, value


def _keeps(value: Any, rule: Rule) -> bool:
    if value is None:
        return rule.optional
    if isinstance(value, bool) or not isinstance(value, int if rule.whole else int | float):
        return False
    return rule.least <= value <= rule.most and value != float("inf")
