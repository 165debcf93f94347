"""Base class of vision encoders: images in, features on explicit grids out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...connectors import Features, PackedFeatures, VisionFeatures
from ...connectors.base import are_several
from ...errors import first_line
from ...files import read_object
from ...visual import Pixels, Size
from ..loading import load_strictly


class VisionEncoder(nn.Module):
    """Base class of all vision encoders.

    image_size: ``(H, W)`` in pixels; grid: ``(H, W)`` in patches; width: number of feature channels;
    layer: which hidden state is returned, as in Hugging Face's ``hidden_states[layer]``, where 1 is the output of
    the first block and -1 that of the last block (before any final norm); levels: additional layers, shallow to deep,
    for connectors that read several. multiple: both sides of a grid must be multiples of it. size_rule: how
    images of their own sizes are rounded, a name in `vlmtrain.data.native_sizes`. block_path: path of the list of
    blocks that layers count; None for the longest list of modules. join: how the features of several encoders are
    joined; None for one. provider, options: name under which the class is registered, and the options with which it was
    built; set by `build_vision`.

    A subclass sets image_size, patch_size, width, num_blocks, image_mean and image_std (of pixels in [0, 1]), calls
    `set_layers`, and implements `build` and `forward`, which may use `as_features`. If it does not interpolate its
    positions but supports other image sizes, it implements `_resize`. frames_per_item: number of frames of a video that
    it reads as one image, ``(T, 3, H, W)``. batch_size: maximum number of images that `encode` passes to the encoder at
    once; None for all.
    """

    provider: str = ""
    image_size: Size
    patch_size: Size
    width: int | tuple[int, ...]
    layer: int
    levels: list[int]
    num_blocks: int
    multiple: int = 1
    frames_per_item: int = 1
    batch_size: int | None = None
    size_rule: str = "smart_resize"
    block_path: str | None = None
    join: str | None = None
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    options: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def build(
        cls,
        *,
        image_size: int | Size | None,
        layer: int,
        levels: Sequence[int] | None,
        weights: bool = True,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> VisionEncoder:
        """Build the encoder from the keys of ``vision``.

        image_size: in pixels; None means the encoder's own. weights: False skips loading published weights, to inspect
        sizes or to load others. Raises ValueError for options that do not fit.
        """
        raise NotImplementedError

    @property
    def encoders(self) -> dict[str, VisionEncoder]:
        """The encoders by name; this one alone, without a name, unless it holds several."""
        return {"": self}

    @property
    def grids(self) -> list[Size]:
        """The grid of the features of each encoder that a connector reads."""
        return [self.grid]

    @property
    def grid(self) -> Size:
        return self.grid_of(self.image_size)

    def grid_of(self, size: Size) -> Size:
        """Grid of patches of an image of `size` pixels."""
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    @property
    def step(self) -> Size:
        """Pixels of which the sides of an image are multiples: `multiple` patches."""
        return self.patch_size[0] * self.multiple, self.patch_size[1] * self.multiple

    def _check_geometry(self, key: str = "vision.image_size") -> None:
        """Raise ValueError, naming `key`, if the image size is not a multiple of the patch size and of `multiple`.

        The encoder's own size is exempt: an incomplete edge is then ignored.
        """
        for side, patch, step in zip(self.image_size, self.patch_size, self.step):
            if side < step or side % step:
                times = f" times {self.multiple}" if self.multiple > 1 else ""
                raise ValueError(
                    f"{key}={self.image_size[0]}x{self.image_size[1]} is not a multiple of the "
                    f"encoder's patch size {patch}{times}: use, for example, {max(1, round(side / step)) * step}"
                )

    def resize(self, image_size: int | Size, key: str = "vision.image_size") -> None:
        """Change the image size; a learned position table is interpolated bicubically.

        Raises ValueError, naming `key`, for a size that is not a multiple of the patch size and of `multiple`.
        """
        before, self.image_size = self.image_size, as_size(image_size)
        if self.image_size != before:
            self._check_geometry(key)
            self._resize(before)

    def _resize(self, before: Size) -> None:
        """Adapt the encoder to a changed `image_size`. Raises ValueError if it has a fixed one."""
        raise ValueError(f"{type(self).__name__} does not support other image sizes than {before[0]}x{before[1]}")

    def check_any_size(self) -> None:
        """Raise ValueError unless the encoder supports images of other sizes than `image_size`."""
        size = (2 * self.step[0], 3 * self.step[1])
        (height, width), pixels = self.grid_of(size), next(self.parameters()).new_zeros(1, 3, *size)
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                grid = tuple(self(pixels).patches.shape[1:3])
            problem = None if grid == (height, width) else f"a {height}x{width} grid becomes {grid[0]}x{grid[1]}"
        except Exception as error:  # an encoder can raise anything for a size that it does not expect
            problem = first_line(error)
        finally:
            self.train(was_training)
        if problem:
            raise ValueError(
                f"image_fit=native needs an encoder that interpolates its positions, but {type(self).__name__} does "
                f"not ({problem}): use another encoder or image_fit"
            )

    def set_layers(self, layer: int, levels: Sequence[int] | None) -> None:
        """Set `layer` and `levels`. Raises ValueError if the encoder has no such block, or if grids would differ."""
        block_index(layer, self.num_blocks)
        for level in levels or ():
            block_index(level, self.num_blocks, "vision.levels")
        self.layer = layer
        self.levels = list(levels or ())

    def give_levels(self, count: int) -> None:
        """Return `count` additional hidden layers, as required by a connector, unless they are already set.

        The layers are evenly spaced up to `layer`, or over the complete encoder if that is too shallow. Raises
        ValueError if a different number is set.
        """
        if not self.levels and count:
            depth = block_index(self.layer, self.num_blocks) + 1
            last = depth if depth >= count else self.num_blocks
            if last < count:
                raise ValueError(f"the connector reads {count} hidden layers, but the encoder has {last}")
            self.set_layers(self.layer, [last * (i + 1) // count for i in range(count)])
        if count and len(self.levels) != count:
            raise ValueError(
                f"the connector reads {count} hidden layers, but vision.levels={self.levels} lists {len(self.levels)}"
            )

    def as_features(self, state: Callable[[int], Tensor], images: Tensor) -> VisionFeatures:
        """Split the hidden states ``(B, P + H*W, C)`` of the returned layers into prefix and raster grids."""
        height, width = self.grid_of(images.shape[2:])
        tokens = state(self.layer)
        num_prefix = tokens.shape[1] - height * width
        assert num_prefix >= 0, f"{tokens.shape[1]} tokens for a {height}x{width} grid"
        if tokens.shape[-1] != self.width:
            raise ValueError(
                f"{type(self).__name__} returned {tokens.shape[-1]} channels, but its width is {self.width}"
            )

        def grid_of(tokens: Tensor) -> Tensor:
            return tokens[:, num_prefix:].unflatten(1, (height, width))

        prefix = tokens[:, :num_prefix] if num_prefix else None
        return VisionFeatures(grid_of(tokens), prefix, tuple(grid_of(state(level)) for level in self.levels))

    def encode(self, pixels: Pixels, calls: int = 1, chunks: int = 1) -> Features:
        """Features of images of one size ``(N, 3, H, W)``, or of images of their own sizes, each ``(3, H, W)``.

        Images of different sizes are encoded in groups of equal size, and groups in chunks of `batch_size`. calls:
        maximum number of groups on any rank; chunks: the number of chunks that their images would fill. Stand-ins make
        up for missing calls, because all ranks that train the encoder must make the same number of calls.
        """
        if isinstance(pixels, Tensor):
            parts = [self(part) for part in self._chunks(pixels)]
            unseen = [self._unseen(pixels[:1]) for _ in range(chunks - len(parts))]
            return with_unseen(concatenated(parts), unseen)
        sizes = [tuple(image.shape[1:]) for image in pixels]
        found: dict[int, VisionFeatures] = {}
        made = 0
        for size in sorted(set(sizes)):
            members = [number for number, own in enumerate(sizes) if own == size]
            parts = [self(part) for part in self._chunks(torch.stack([pixels[number] for number in members]))]
            found |= dict(zip(members, rows_of(concatenated(parts))))
            made += len(parts)
        smallest = pixels[sizes.index(min(sizes))][None]
        unseen = [self._unseen(smallest) for _ in range(calls + chunks - 1 - made)]
        return with_unseen(packed([found[number] for number in range(len(pixels))]), unseen)

    def _chunks(self, images: Sequence[Tensor] | Tensor) -> list:
        """The images in chunks of `batch_size`."""
        size = self.batch_size or max(1, len(images))
        return [images[start : start + size] for start in range(0, max(1, len(images)), size)]

    def _unseen(self, images: Pixels) -> Features:
        """The features of blank images like these."""
        return self(torch.zeros_like(images) if isinstance(images, Tensor) else tuple(map(torch.zeros_like, images)))

    def encode_all(
        self, pixels: Sequence[Pixels], calls: int = 1, chunks: int = 1, known: Sequence[Features | None] = (None,)
    ) -> Features | tuple[Features, ...]:
        """What the connector reads of the images: the features of all encoders, joined.

        pixels: for each encoder. calls, chunks: see `encode`. known: for each encoder, its features if they are known.
        """
        return self.encode(pixels[0], calls, chunks) if known[0] is None else known[0]

    def forward(self, images: Tensor) -> VisionFeatures:
        """Map normalized images ``(B, 3, H, W)`` to features."""
        raise NotImplementedError

    @property
    def architecture(self) -> dict:
        """Plain values that, with weights, image size and layers, define the encoder's function."""
        return {self.provider: dict(self.options)}

    def describe(self) -> dict:
        """Plain values from which `from_description` builds the encoder again, without its weights."""
        chosen = {"image_size": list(self.image_size), "layer": self.layer, "levels": self.levels}
        return {**chosen, "options": dict(self.options)}

    @classmethod
    def from_description(cls, saved: Mapping[str, Any]) -> VisionEncoder:
        """Build the encoder of a description, with new weights."""
        options = dict(saved["options"])
        chosen = {key: saved[key] for key in ("image_size", "layer", "levels")}
        encoder = cls.build(**chosen, **options, weights=False)
        encoder.options = options
        return encoder

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the description and the weights `state` (this module's full state dict) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"provider": self.provider, **self.describe()}, indent=2) + "\n")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> VisionEncoder:
        """Load an encoder that was written by `save`. trust_remote_code: whether custom code of the folder may run."""
        file = folder / "config.json"
        try:
            encoder = cls.from_description(read_object(file))
        except Exception as error:  # libraries can raise anything for a configuration that cannot be built
            raise ValueError(f"{file} describes no encoder that can be built: {first_line(error)}") from None
        load_strictly(encoder, folder / "model.safetensors")
        return encoder.to(dtype)


def description_file(folder: Path) -> Path:
    """The file in which `VisionEncoder.save` wrote the description of an encoder."""
    of_hf = folder / "vlmtrain.json"
    return of_hf if of_hf.exists() else folder / "config.json"


def rows_of(features: Features | tuple[Features, ...]) -> list:
    """The features of each image, without the batch dimension; a tuple of them for several encoders."""
    if are_several(features):
        return list(zip(*map(rows_of, features)))
    columns = [features.patches, *features.levels]
    if isinstance(features, PackedFeatures):
        sizes = [height * width for height, width in features.grids]
        columns = [
            [piece.unflatten(0, grid) for piece, grid in zip(column.split(sizes), features.grids)] for column in columns
        ]
    prefixes = [None] * len(columns[0]) if features.prefix is None else features.prefix
    return [VisionFeatures(patches, prefix, levels) for prefix, (patches, *levels) in zip(prefixes, zip(*columns))]


def stacked(rows: Sequence) -> VisionFeatures | tuple[VisionFeatures, ...]:
    """The features of images of one size, given those of each image as `rows_of` returns them."""
    if are_several(rows[0]):
        return tuple(map(stacked, zip(*rows)))
    prefix = None if rows[0].prefix is None else torch.stack([row.prefix for row in rows])
    patches, *levels = (torch.stack(column) for column in zip(*((row.patches, *row.levels) for row in rows)))
    return VisionFeatures(patches, prefix, tuple(levels))


def packed(rows: Sequence) -> PackedFeatures | tuple[PackedFeatures, ...]:
    """The features of images of their own sizes, given those of each image as `rows_of` returns them."""
    if are_several(rows[0]):
        return tuple(map(packed, zip(*rows)))
    prefix = None if rows[0].prefix is None else torch.stack([row.prefix for row in rows])
    grids = tuple(tuple(row.patches.shape[:2]) for row in rows)
    columns = zip(*((row.patches, *row.levels) for row in rows))
    patches, *levels = (torch.cat([each.flatten(0, 1) for each in column]) for column in columns)
    return PackedFeatures(patches, grids, prefix, tuple(levels))


def concatenated(parts: Sequence[Features]) -> Features:
    """The features of the images of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    prefix = None if first.prefix is None else torch.cat([part.prefix for part in parts])
    patches, *levels = (torch.cat(column) for column in zip(*((part.patches, *part.levels) for part in parts)))
    found = first._replace(patches=patches, prefix=prefix, levels=tuple(levels))
    return found if first.grids is None else found._replace(grids=sum((part.grids for part in parts), ()))


def with_unseen(features: Features, unseen: Sequence[Features]) -> Features:
    """The same features, whose backward pass also runs through those `unseen`.

    Layer by layer, since a layer that a connector does not read has no backward pass on the other ranks either.
    """
    for each in unseen:
        levels = tuple(level + 0.0 * other.sum() for level, other in zip(features.levels, each.levels))
        features = features._replace(patches=features.patches + 0.0 * each.patches.sum(), levels=levels)
    return features


def as_size(size: int | Size | list[int]) -> Size:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def block_index(layer: int, num_blocks: int, key: str = "vision.layer") -> int:
    """Index of the block whose output is ``hidden_states[layer]`` of ``num_blocks + 1`` states."""
    index = layer - 1 if layer > 0 else num_blocks + layer
    if layer == 0 or not 0 <= index < num_blocks:
        raise ValueError(
            f"{key}={layer} is out of range for an encoder of {num_blocks} blocks: "
            f"expected 1..{num_blocks} or -{num_blocks}..-1"
        )
    return index
