"""Values that modules read during a forward pass, and again when its activations are recomputed."""

from __future__ import annotations

from typing import Any


class Within:
    """Context in which attributes of an object have other values; it can be entered again."""

    def __init__(self, owner: object, **values: Any):
        self.owner, self.values = owner, values

    def __enter__(self) -> None:
        self.before = {name: getattr(self.owner, name) for name in self.values}
        vars(self.owner).update(self.values)

    def __exit__(self, *error) -> None:
        vars(self.owner).update(self.before)
