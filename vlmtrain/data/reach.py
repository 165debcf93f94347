"""Procedural images of a gripper above colored shapes, with the motion that brings it to one of them as an action.

    (seed, split, i) -> scene of `shapes`, target, place of the gripper -> image, instruction, action -> Conversation

An action is two numbers in [-1, 1]: how far the gripper has to move to the right and down to reach the center of the
target, as fractions of the image's sides. Text alone does not say where the gripper and the target are.
The target has a color-shape pair in `HELD_OUT` in all validation images and in no others.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import shapes
from .actions import ACTION_MARK
from .records import IMAGE_MARK, Conversation, Turn
from .shapes import CAPTION_OBJECTS, HELD_OUT, INK, Canvas, Picture, random_scene

SPLITS = ("instruct", "validation")
EDGE = 0.1
"""Smallest distance of the gripper from the sides of the image, as a fraction of a side."""
ARM, THICKNESS = 0.08, 0.04
"""Length of the four arms of the gripper from its center, and their thickness, as fractions of the scene's side."""
VOCABULARY: tuple[str, ...] = (*shapes.VOCABULARY, "touch")
"""All words in the texts, and those of the shapes."""


@dataclass(frozen=True, kw_only=True)
class ReachPicture(Picture):
    """A scene with a gripper, a plus sign at `gripper`, which is x and y as fractions of the width and the height."""

    gripper: tuple[float, float]

    def draw(self, canvas: Canvas) -> None:
        super().draw(canvas)
        x, y = self.gripper[0] * canvas.width, self.gripper[1] * canvas.height
        arm, half = ARM * canvas.side, THICKNESS * canvas.side / 2
        for across, down in ((arm, half), (half, arm)):
            canvas.drawing.rectangle((x - across, y - down, x + across, y + down), fill=INK)


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
        items, _ = random_scene(rng, rng.choice(CAPTION_OBJECTS), held_out)
        target = rng.choice([item for item in items if ((item.color, item.shape) in HELD_OUT) == held_out])
        gripper = (rng.uniform(EDGE, 1 - EDGE), rng.uniform(EDGE, 1 - EDGE))
        pixels = (self.image_size, self.image_size)
        image = ReachPicture(items=items, pixels=pixels, side=self.image_size, gripper=gripper)
        turns = (
            Turn("user", f"{IMAGE_MARK}\ntouch the {target.color} {target.shape}"),
            Turn("assistant", ACTION_MARK),
        )
        action = (target.x - gripper[0], target.y - gripper[1])
        return Conversation(f"{self.split}-{index}", turns, (image,), actions=(action,))
