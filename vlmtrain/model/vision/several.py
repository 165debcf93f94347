"""Several vision encoders in one model, whose features are joined."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...connectors import Features, PackedFeatures, VisionFeatures
from ...visual import Pixels, Size
from .base import VisionEncoder, as_size

JOINS = ("channels", "tokens", "separate")
TAKEN = ("blocks", "layers", "encoders")  # names with a meaning in patterns
LOOKS = ("image_fit", "grid", "image_mean", "image_std")  # keys of an encoder besides those of its provider


class SeveralVision(VisionEncoder):
    """Several encoders that see the same images, each at its own size and with its own normalization.

    Features follow the order in which `encoders` are given. join: how they are joined.

    - ``channels``: along the channels, on one grid. Prefix tokens are dropped (Prismatic, Karamcheti et al., 2024;
      Eagle, Shi et al., 2024, section 3).
    - ``tokens``: as a tuple for one connector per encoder, whose tokens are concatenated.
    - ``separate``: as a tuple for one connector that takes several encoders (BRAVE, Cambrian-1).

    grid: ``(H, W)`` or the name of an encoder, to whose grid the features of the others are resized bilinearly; None to
    leave them as they are, which ``channels`` allows if all grids are equal. align_corners: of the resizing. looks: for
    each encoder, its `LOOKS` that are set; its own ``grid`` takes precedence. The image size, patch size and
    normalization are those of the first encoder; `encoders` has the others.
    """

    provider = "several"

    def __init__(
        self,
        encoders: Mapping[str, VisionEncoder],
        join: str = "channels",
        grid: str | Size | None = None,
        align_corners: bool = False,
        looks: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__()
        if len(encoders) < 2:
            raise ValueError(f"vision.encoders={list(encoders)}: expected at least two encoders")
        if join not in JOINS:
            raise ValueError(f"vision.join={join}: expected one of {', '.join(JOINS)}")
        self.names = tuple(encoders)
        taken = {*TAKEN, *dir(type(self)), *vars(self), *VisionEncoder.__annotations__, "looks", "align_corners"}
        for name, encoder in encoders.items():
            if not isinstance(name, str) or not name.isidentifier() or iskeyword(name) or name in taken:
                raise ValueError(f"vision.encoders.{name}: an encoder cannot have this name; choose another one")
            self.add_module(name, encoder)
        self.join, self.grid_name, self.align_corners = join, grid, align_corners
        self.looks = {name: dict((looks or {}).get(name, {})) for name in self.names}
        for name, encoder in encoders.items():
            for key in ("image_mean", "image_std"):
                if self.looks[name].get(key) is not None:
                    setattr(encoder, key, tuple(self.looks[name][key]))
        first = encoders[self.names[0]]
        self.image_size, self.patch_size, self.size_rule = first.image_size, first.patch_size, first.size_rule
        self.image_mean, self.image_std = first.image_mean, first.image_std
        self.layer, self.num_blocks = first.layer, first.num_blocks
        self.multiple = math.lcm(*(encoder.multiple for encoder in encoders.values()))
        self._check_join()

    @classmethod
    def build(
        cls,
        encoders: Mapping[str, Mapping[str, Any]],
        join: str = "channels",
        grid: str | Size | None = None,
        align_corners: bool = False,
        *,
        build: Callable[..., VisionEncoder],
        **options: Any,
    ) -> SeveralVision:
        """Build the encoders from their keys, by name: those of ``vision`` with their provider, and `LOOKS`.

        build: `vlmtrain.model.vision.build_vision`; options: for it.
        """
        built, looks = {}, {}
        for name, keys in encoders.items():
            looks[name] = {key: keys[key] for key in LOOKS if keys.get(key) is not None}
            mine = LOOKS if keys.get("provider") != "hf" else {*LOOKS[:2], *looks[name]}
            own = {key: value for key, value in keys.items() if key not in mine}
            try:
                built[name] = build(**own, **options)
            except ValueError as error:
                raise ValueError(of_encoder(name, error)) from None
        return cls(built, join, grid, align_corners, looks)

    @property
    def encoders(self) -> dict[str, VisionEncoder]:
        return {name: self._modules[name] for name in self.names if name in self._modules}

    @property
    def grids(self) -> list[Size]:
        return self._grids

    def only(self, names: Collection[str]) -> SeveralVision:
        """The same, holding only some of the encoders; the features of the others must be known to `encode_all`."""
        other = copy(self)
        nn.Module.__init__(other)
        other.__dict__ |= {key: value for key, value in self.__dict__.items() if key not in other.__dict__}
        for name in names:
            other.add_module(name, self._modules[name])
        return other

    @property
    def levels(self) -> list[int]:
        return self._facts[0].levels

    def _check_join(self) -> None:
        encoders = self.encoders
        self._facts = list(encoders.values())
        widths = tuple(encoder.width for encoder in encoders.values())
        self.width = sum(widths) if self.join == "channels" else widths
        grids = {name: encoder.grid for name, encoder in encoders.items()}
        if isinstance(self.grid_name, str) and self.grid_name not in grids:
            raise ValueError(f"vision.grid={self.grid_name}: expected [HEIGHT, WIDTH] or one of {', '.join(grids)}")
        if self.grid_name is not None:
            target = grids[self.grid_name] if isinstance(self.grid_name, str) else as_size(self.grid_name)
            grids = dict.fromkeys(grids, target)
        grids |= {name: as_size(look["grid"]) for name, look in self.looks.items() if look.get("grid")}
        self._grids = list(grids.values())
        if self.join != "channels":
            return
        fits = {name: look.get("image_fit") for name, look in self.looks.items()}
        if len(set(fits.values())) > 1:
            told = ", ".join(f"{name}: {fit or 'null'}" for name, fit in fits.items())
            raise ValueError(
                f"vision.join=channels joins patches that show the same part of an image, but image_fit differs "
                f"({told}; null is the stage's): use one image_fit, or join=tokens or separate"
            )
        if len(set(grids.values())) > 1:
            told = ", ".join(f"{height}x{width} ({name})" for name, (height, width) in grids.items())
            raise ValueError(
                f"vision.join=channels needs one grid, but the grids are {told}: set vision.grid to the name of "
                "an encoder or to [H, W]"
            )

    def grid_of(self, size: Size) -> Size:
        """Grid of the joined features, or of those of the first encoder, for an image of `size` pixels."""
        return self._grids[0] if tuple(size) == tuple(self.image_size) else self._facts[0].grid_of(size)

    def set_layers(self, layer: int, levels: Sequence[int] | None) -> None:
        raise ValueError("vision.layer and vision.levels are set for each encoder: vision.encoders.NAME.layer")

    def give_levels(self, count: int) -> None:
        for encoder in self._facts:
            encoder.give_levels(count)

    def resize(self, image_size: int | Size, key: str = "vision.image_size") -> None:
        if as_size(image_size) != self.image_size:
            raise ValueError(
                f"{key}={image_size}: several encoders have their own: set vision.encoders.NAME.image_size"
            )

    def check_any_size(self) -> None:
        """Raise ValueError unless all encoders support images of other sizes, and make one grid of each."""
        for name, encoder in self.encoders.items():
            try:
                encoder.check_any_size()
            except ValueError as error:
                raise ValueError(f"vision.encoders.{name}: {error}") from None
        fixed = [f"vision.encoders.{name}.grid" for name, look in self.looks.items() if look.get("grid")]
        fixed += ["vision.grid"] * (self.grid_name is not None) + ["vision.join=tokens"] * (self.join == "tokens")
        for key in fixed:
            raise ValueError(f"image_fit=native gives every image a grid of its own, which {key} does not support")

    def encode_all(
        self, pixels: Sequence[Pixels], calls: int = 1, chunks: int = 1, known: Sequence[Features | None] = ()
    ) -> Features | tuple[Features, ...]:
        found = tuple(
            self._modules[name].encode(images, calls, chunks) if features is None else features
            for name, images, features in zip(self.names, pixels, known or [None] * len(self.names), strict=True)
        )
        return self.joined(found)

    def joined(self, found: tuple[Features, ...]) -> Features | tuple[Features, ...]:
        """What the connector reads, given the features of each encoder."""
        if not isinstance(found[0], PackedFeatures):
            found = tuple(map(self._resized, found, self._grids))
        return _beside(found) if self.join == "channels" else found

    def _resized(self, features: VisionFeatures, grid: Size) -> VisionFeatures:
        if tuple(features.patches.shape[1:3]) == tuple(grid):
            return features

        def resize(patches: Tensor) -> Tensor:
            columns, options = patches.movedim(3, 1), {"mode": "bilinear", "align_corners": self.align_corners}
            return F.interpolate(columns, grid, **options).movedim(1, 3)

        return features._replace(patches=resize(features.patches), levels=tuple(map(resize, features.levels)))

    def forward(self, *images: Tensor) -> VisionFeatures | tuple[VisionFeatures, ...]:
        """Map the normalized images of each encoder, ``(B, 3, H, W)``, to the joined features."""
        return self.encode_all(images)

    @property
    def architecture(self) -> dict:
        return {name: [encoder.architecture, self.looks[name]] for name, encoder in self.encoders.items()}

    def describe(self) -> dict:
        grid = list(self.grid_name) if isinstance(self.grid_name, tuple | list) else self.grid_name
        return {
            "join": self.join,
            "grid": grid,
            "align_corners": self.align_corners,
            "looks": self.looks,
            "encoders": {
                name: {"provider": encoder.provider, **encoder.describe()} for name, encoder in self.encoders.items()
            },
        }

    @classmethod
    def from_description(cls, saved: Mapping[str, Any]) -> SeveralVision:
        """Build the encoder of a description, whose ``encoders`` are built already."""
        return cls(saved["encoders"], saved["join"], saved["grid"], saved["align_corners"], saved["looks"])


def of_encoder(name: str, error: ValueError) -> str:
    """The message of an error about the keys of one of several encoders."""
    said = str(error)
    return f"vision.encoders.{name}{'' if said.startswith('vision.') else ': '}{said.removeprefix('vision')}"


def _beside(found: Sequence[Features]) -> Features:
    """Features of the same images on the same grids, concatenated along the channels, without prefix."""
    patches, *levels = (torch.cat(each, -1) for each in zip(*((one.patches, *one.levels) for one in found)))
    return found[0]._replace(patches=patches, prefix=None, levels=tuple(levels))
