"""The image processor of a published model, and whether images of one size are prepared like it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, ImageProcessingMixin

from ..data.geometry import Geometry
from ..data.images import show_items
from ..errors import first_line
from ..files import read_json
from ..visual import normalized

_TOLD = ("size", "crop_size", "do_resize", "do_center_crop", "do_pad", "do_rescale", "rescale_factor", "do_normalize")


def read_preparation(folder: Path) -> tuple[Path, ImageProcessingMixin]:
    """The source's image processor, and the file that configures it."""
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.exists():
            settings = read_json(file)
            settings = settings.get("image_processor", settings)
            if settings.get("image_mean") and settings.get("image_std"):
                try:
                    return file, AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
                except (ValueError, OSError, ImportError, TypeError) as error:
                    raise ValueError(f"{file} is not a valid image processor: {first_line(error)}") from None
    raise ValueError(f"{folder / 'preprocessor_config.json'} is missing, or has no image_mean and image_std")


def fit_of(preparation: ImageProcessingMixin) -> str:
    """The image fit of an image processor for images of one size."""
    if getattr(preparation, "do_pad", False):
        return "pad"
    return "crop" if getattr(preparation, "do_center_crop", False) else "squash"


def check_pixels(file: Path, preparation: ImageProcessingMixin, geometry: Geometry) -> None:
    """Raise ValueError unless a smooth, wide image is prepared as by the source's processor."""
    height, width = geometry.size
    across, down = torch.linspace(0, 255, 2 * width), torch.linspace(0, 255, height + height // 4)
    x, y = torch.meshgrid(across, down, indexing="xy")
    image = Image.fromarray(torch.stack([x, y, 255 - x], dim=-1).to(torch.uint8).numpy())
    items = geometry.plan([(image.height, image.width)]).items
    ours = normalized(torch.stack(show_items(image, items, geometry.mean)), geometry.mean, geometry.std)
    problem = f"resample={int(preparation.resample)}, expected 3 (bicubic)" if preparation.resample != 3 else None
    if problem is None:
        try:
            theirs = preparation(images=[image], return_tensors="pt")["pixel_values"].flatten(0, -4)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{file} cannot prepare an image: {first_line(error)}") from None
        if theirs.shape != ours.shape:
            problem = f"images of {_by(theirs)} pixels, expected {_by(ours)} as for the encoder"
        else:
            levels = (theirs - ours).abs() * torch.tensor(geometry.std)[:, None, None] * 255
            worst = float(levels.max())
            if worst > 1.5:
                told = preparation.to_dict()
                said = ", ".join(f"{key}={told[key]}" for key in _TOLD if told.get(key) is not None)
                problem = f"{said}: pixels differ from image_fit={geometry.fit} by {worst:.0f} of 255 levels"
    if problem:
        raise ValueError(f"{file}: {problem} (vlmtrain import with --image-fit imports the model anyway)")


def _by(views: Tensor) -> str:
    return " x ".join(str(side) for side in (len(views), *views.shape[-2:]))
