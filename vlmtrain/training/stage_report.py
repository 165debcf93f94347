"""Reports of a stage: a table of the trained parameters before it starts, and sample answers with images after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from ..data.media import decode_frames
from ..data.processor import Processor
from ..data.records import Conversation, Source, is_video
from ..evaluation.held_out import shown
from ..reporting.images import image_uri, strip_uri
from ..reporting.tables import text_table
from .trainable import Group, groups_of, part_size

SHOWN_SAMPLES = 48
SHOWN_FRAMES = 8


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


def shown_samples(source: Source, processor: Processor, answers: Sequence[dict]) -> list[dict]:
    """A few answers with their images, and some frames of their videos that the model was shown, for the report."""
    return [
        {**answer, "pictures": list(_pictures(source[answer["conversation"]], processor))}
        for answer in answers[:SHOWN_SAMPLES]
    ]


def _pictures(conversation: Conversation, processor: Processor) -> Iterator[str]:
    conversation = shown(processor, conversation)
    items = processor.render(conversation).media.items if any(map(is_video, conversation.media)) else ()
    for number, medium in enumerate(conversation.media):
        if not is_video(medium):
            yield image_uri(medium.load())
            continue
        firsts = [item._replace(times=item.times[:1]) for item in items if item.medium == number]
        few = min(SHOWN_FRAMES, len(firsts))
        yield strip_uri(decode_frames(medium, [firsts[i * len(firsts) // few] for i in range(few)]))
