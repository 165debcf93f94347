"""Keys of a record: those that are read, and those that would change training if they were."""

from __future__ import annotations

import re

from .images import is_image_value
from .records import BadSample

KEYS = {
    "messages": ("conversations", "messages", "texts"),
    "dialogues": ("dialogues",),
    "question": ("question", "query", "prompt"),
    "answer": ("answer", "label", "answers", "completion", "response"),
    "caption": ("caption", "text", "captions"),
    "image": ("image", "images"),
    "video": ("video", "videos"),
    "video_start": ("video_start",),
    "video_end": ("video_end",),
    "actions": ("actions",),
    "system": ("system",),
    "id": ("id",),
}
"""Keys of a record by role; the first one that is present is read."""
FORMS = (("messages",), ("dialogues",), ("question", "answer"), ("caption",))
"""Roles that together provide a record's text."""
REFUSED = re.compile(
    r"(.*_)?(videos?|audios?|tools|tool_calls|functions?|function_call|reasoning|reasoning_content|thinking|chosen|"
    r"rejected|rejected_response|history|objects|images?|img|picture|instruction|system_prompt|context)"
)
"""Keys whose content would change training if it was read."""
REFUSED_WEIGHT = re.compile(
    r"(.*_)?(loss|loss_scale|loss_mask|loss_weight|sample_weight|weight|train|trainable|train_on_turn)"
)
"""Keys of the weight of a sample or a turn, which would change training whatever their value is."""


def refuse_if_needed(key: object, value: object, has_images: bool, name: str) -> None:
    """Raise BadSample for the content of an unused key that would change training if it was read.

    Further paths of images are allowed if the record has images: they are often the origin of these.
    """
    if isinstance(key, str) and REFUSED_WEIGHT.fullmatch(key):
        raise BadSample(f"{name}: '{key}' is not supported; data.ignore=[{key}] trains without it")
    if not value or not isinstance(key, str):
        return
    is_image = is_image_value(value)
    if is_image and isinstance(value, str) and has_images and REFUSED.fullmatch(key) is None:
        return
    if is_image:
        raise BadSample(
            f"{name}: '{key}' contains an image that nothing reads: set data.columns.image={key} (data=hf), rename it "
            f"to 'image', or ignore it with data.ignore=[{key}]"
        )
    if REFUSED.fullmatch(key):
        raise BadSample(f"{name}: '{key}' is not supported; data.ignore=[{key}] trains without it")
