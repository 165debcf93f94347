"""Reports of a stage: a table of the trained parameters before it starts, and sample answers with images after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..data.records import Source
from ..reporting.images import image_uri
from ..reporting.tables import text_table
from .trainable import Group, groups_of, part_size

SHOWN_SAMPLES = 48


def training_table(parts: Mapping[str, nn.Module], groups: Sequence[Group], waiting: Sequence[Group]) -> str:
    """A table of the trained parameters with their learning rates, and of the frozen ones.

    waiting: the groups that start to train later in the stage.
    """
    rows = [("part", "parameters", "learning rate")]
    for part, module in parts.items():
        left = part_size(module)
        everything = groups_of(part, (*groups, *waiting))
        for label in dict.fromkeys(group.label for group in everything):
            labelled = [group for group in everything if group.label == label]
            number = sum(group.size(module) for group in labelled)
            left -= number
            waits = f" from step {labelled[0].from_step + 1}" if labelled[0] in waiting else ""
            rows.append((label, f"{number:,}", f"{labelled[0].lr:g}{waits}"))
        if left:
            rows.append((part, f"{left:,}", "frozen"))
    return text_table(rows, indent=2)


def shown_samples(source: Source, answers: Sequence[dict]) -> list[dict]:
    """A few answers with their images, for the report."""
    shown = []
    for answer in answers[:SHOWN_SAMPLES]:
        images = source[answer["conversation"]].images
        shown.append({**answer, "pictures": [image_uri(image.load()) for image in images]})
    return shown
