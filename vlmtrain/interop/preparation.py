"""The image and video processors of a published model, and whether images of one size are prepared like them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoVideoProcessor, ImageProcessingMixin
from transformers.video_processing_utils import BaseVideoProcessor

from ..data.geometry import Geometry
from ..data.images import show_items
from ..data.records import VideoFacts
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


def read_video_preparation(folder: Path) -> tuple[Path, BaseVideoProcessor]:
    """The source's video processor, and the file that configures it, which may be that of the images."""
    names = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
    files = (folder / name for name in names if (folder / name).exists())
    file = next((file for file in files if file.name != names[0] or "video_processor" in read_json(file)), None)
    if file is None:
        raise ValueError(f"{folder / names[1]} is missing")
    try:
        return file, AutoVideoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a valid video processor: {first_line(error)}") from None


def fit_of(preparation: ImageProcessingMixin) -> str:
    """The image fit of an image processor for images of one size."""
    if getattr(preparation, "do_pad", False):
        return "pad"
    return "crop" if getattr(preparation, "do_center_crop", False) else "squash"


def check_pixels(file: Path, preparation: ImageProcessingMixin | BaseVideoProcessor, geometry: Geometry) -> None:
    """Raise ValueError unless a smooth, wide image or frame is prepared as by the source's processor."""
    height, width = geometry.size
    across, down = torch.linspace(0, 255, 2 * width), torch.linspace(0, 255, height + height // 4)
    x, y = torch.meshgrid(across, down, indexing="xy")
    pixels = torch.stack([x, y, 255 - x], dim=-1).to(torch.uint8)
    image, is_video = Image.fromarray(pixels.numpy()), isinstance(preparation, BaseVideoProcessor)
    size = (image.height, image.width)
    items = geometry.plan([VideoFacts(np.zeros(1), 1.0, size) if is_video else size]).items
    ours = normalized(torch.stack(show_items(image, items, geometry.mean)), geometry.mean, geometry.std)
    fit = f"video.fit={geometry.video.fit}" if is_video else f"image_fit={geometry.fit}"
    problem = f"resample={int(preparation.resample)}, expected 3 (bicubic)" if preparation.resample != 3 else None
    if problem is None:
        try:
            if is_video:
                frames = pixels.movedim(-1, 0)[None]
                theirs = preparation([frames], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
            else:
                theirs = preparation(images=[image], return_tensors="pt")["pixel_values"]
            theirs = theirs.flatten(0, -4)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{file} cannot prepare {'a video' if is_video else 'an image'}: {first_line(error)}"
            ) from None
        if theirs.shape != ours.shape:
            problem = f"images of {_by(theirs)} pixels, expected {_by(ours)} as for the encoder"
        else:
            levels = (theirs - ours).abs() * torch.tensor(geometry.std)[:, None, None] * 255
            worst = float(levels.max())
            if worst > 1.5:
                told = preparation.to_dict()
                said = ", ".join(f"{key}={told[key]}" for key in _TOLD if told.get(key) is not None)
                problem = f"{said}: pixels differ from {fit} by {worst:.0f} of 255 levels"
    if problem:
        raise ValueError(f"{file}: {problem} (vlmtrain import with --image-fit imports the model anyway)")


def _by(views: Tensor) -> str:
    return " x ".join(str(side) for side in (len(views), *views.shape[-2:]))
