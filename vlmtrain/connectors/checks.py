"""Input checks before anything runs: each error gives the value, what was expected, and the option to change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..errors import nearest


class GridError(ValueError):
    """The connector does not support a patch grid."""


def require_positive(**options: int) -> None:
    """Check that each option is a positive integer."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"connector.{name}={value!r}: expected an integer of at least 1")


def require_not_negative(**options: int) -> None:
    """Check that each option is a non-negative integer."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"connector.{name}={value!r}: expected an integer of at least 0")


def require_fraction(**options: float) -> None:
    """Check that each option is a probability below 1."""
    for name, value in options.items():
        if not 0 <= value < 1:
            raise ValueError(f"connector.{name}={value!r}: expected a number of at least 0 and below 1")


def require_choice(value: str, choices: Iterable[str], name: str) -> None:
    """Check that an option is one of the given names."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"connector.{name}={value!r}.{nearest(str(value), choices)} Available: {', '.join(choices)}")


def require_divisible(width: int, width_name: str, divisor: int, option: str) -> None:
    """Check that a width is divisible, for example by the number of heads."""
    if width % divisor:
        raise ValueError(
            f"connector.{option}={divisor} does not divide {width_name}={width}: "
            f"set connector.{option} to a divisor of {width}"
        )


def require_grid(height: int, width: int) -> None:
    """Check that a patch grid has at least one row and one column."""
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise GridError(f"grid {height}x{width}: expected at least one row and one column of patches")


def require_window(height: int, width: int, window: int, option: str) -> None:
    """Check that a window fits into the grid at least once."""
    require_grid(height, width)
    if window > min(height, width):
        raise GridError(
            f"grid {height}x{width} is smaller than connector.{option}={window}: "
            f"expected at least {window}x{window}; lower connector.{option} or raise the image size"
        )


def require_input_grid(input_grid, name: str) -> None:
    """Check that a connector whose position tables have a fixed size was given the patch grid of its encoder."""
    if input_grid is None:
        raise ValueError(
            f"{name} has position tables of a fixed size: expected input_grid=(height, width), the patch grid of the "
            "encoder, got None"
        )


def require_built_grid(height: int, width: int, input_grid: tuple[int, int], name: str) -> None:
    """Check that the grid is the one for which position tables of a fixed size were built."""
    require_grid(height, width)
    if (height, width) != input_grid:
        raise GridError(
            f"grid {height}x{width}: {name} was built for input_grid {input_grid[0]}x{input_grid[1]} and its position "
            "tables are not resized; build it with another input_grid or change the image size"
        )


def require_multiple(height: int, width: int, factor: int, option: str) -> None:
    """Check that both sides of the grid are multiples of a factor."""
    require_grid(height, width)
    if height % factor or width % factor:
        raise GridError(
            f"grid {height}x{width}: expected both sides to be multiples of connector.{option}={factor}; "
            f"change connector.{option} or the image size (vision.image_size)"
        )


def check_features(features, in_dim: int, num_levels: int) -> None:
    """Check rank and width of an encoder's features, packed or not, and that the required levels are present."""
    patches, prefix, levels, grids = features.patches, features.prefix, features.levels, features.grids
    rank, shape = (4, "(B, H, W, C)") if grids is None else (2, "(N, C)")
    _check_tensor(patches, "patches", rank, shape, in_dim)
    if grids is not None:
        _check_grids(grids, len(patches))
    images = len(patches) if grids is None else len(grids)
    if prefix is not None:
        _check_tensor(prefix, "prefix", 3, "(B, P, C)", in_dim)
        if len(prefix) != images:
            raise ValueError(f"features.prefix: expected the batch of patches, {images}, got {len(prefix)}")
    if num_levels and len(levels) != num_levels:
        raise ValueError(
            f"features.levels: expected {num_levels} hidden layers (the connector's num_levels), got "
            f"{len(levels)}; set connector.levels or the layers that the encoder returns"
        )
    for index, level in enumerate(levels[:num_levels]):
        _check_tensor(level, f"levels[{index}]", rank, shape, in_dim)
        if level.shape != patches.shape:
            raise ValueError(
                f"features.levels[{index}]: expected the shape of patches {tuple(patches.shape)}, "
                f"got {tuple(level.shape)}"
            )


def _check_grids(grids: Sequence[tuple[int, int]], patches: int) -> None:
    if not grids:
        raise ValueError("features.grids: expected the grid of at least one image, got none")
    for grid in grids:
        require_grid(*grid)
    expected = sum(height * width for height, width in grids)
    if patches != expected:
        raise ValueError(
            f"features.patches: expected {expected} patches, the sum of features.grids ({len(grids)} images), "
            f"got {patches}"
        )


def _check_tensor(tensor: Tensor, name: str, rank: int, shape: str, width: int) -> None:
    if tensor.ndim != rank:
        raise ValueError(f"features.{name}: expected {shape}, got {tensor.ndim} dimensions {tuple(tensor.shape)}")
    if tensor.shape[-1] != width:
        raise ValueError(
            f"features.{name}: expected width {width} (the connector's in_dim), got {tensor.shape[-1]}; "
            "build the connector with the encoder's width"
        )
