"""Procedural images of colored shapes, as a camera on a gripper sees them, with the motion to one of them as an action.

    (seed, split, i) -> scene of `shapes`, place of the camera, target -> image, instruction, action -> Conversation

An action is two numbers in [-1, 1]: how far the gripper, which is at the center of the image, has to move to the right
and down to reach the center of the target, as fractions of the image's sides. Text alone does not tell it.
The target has a color-shape pair in `HELD_OUT` in all validation images and in no others.
"""

from __future__ import annotations

import random
from dataclasses import replace

from . import shapes
from .actions import ACTION_MARK
from .records import IMAGE_MARK, Conversation, Turn
from .shapes import CAPTION_OBJECTS, HELD_OUT, SceneImage, random_scene

SPLITS = ("instruct", "validation")
SHIFT = 0.15
"""Largest distance of the camera from the center of the scene in x and in y, as a fraction of the image's sides."""
VOCABULARY: tuple[str, ...] = (*shapes.VOCABULARY, "touch")
"""All words in the texts, and those of the shapes."""


class Reach:
    """One split as a sequence of conversations. size: their number. image_size: side of the images in pixels.

    Raises ValueError for an unknown split.
    """

    def __init__(self, split: str, size: int, image_size: int = 48, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of the reach data. Available: {', '.join(SPLITS)}")
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        rng = random.Random(f"{self.seed}/reach/{self.split}/{index}")
        held_out = self.split == "validation"
        scene, _ = random_scene(rng, rng.choice(CAPTION_OBJECTS), held_out)
        x, y = (rng.uniform(-SHIFT, SHIFT) for _ in range(2))
        items = tuple(replace(item, x=item.x - x, y=item.y - y) for item in scene)
        target = rng.choice([item for item in items if ((item.color, item.shape) in HELD_OUT) == held_out])
        image = SceneImage(items=items, pixels=(self.image_size, self.image_size), side=self.image_size)
        question = f"{IMAGE_MARK}\ntouch the {target.color} {target.shape}"
        turns = (Turn("user", question), Turn("assistant", ACTION_MARK))
        action = (target.x - 0.5, target.y - 0.5)
        return Conversation(f"{self.split}-{index}", turns, (image,), actions=(action,))
