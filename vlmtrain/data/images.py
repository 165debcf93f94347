"""Pictures: opened safely, fitted to the encoder's size, normalised."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from .records import BadSample

FITS = ("squash", "pad", "crop")
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class ImageOnDisk:
    """One picture file, opened when it is needed."""

    path: Path

    def load(self) -> Image.Image:
        """The whole picture as RGB. Raises BadSample if the file is missing, truncated or no picture."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(self.path) as image:
                    if image.width * image.height > MAX_PIXELS:
                        raise BadSample(f"image {self.path} has {image.width}x{image.height} pixels: too many")
                    return to_rgb(image)
        except FileNotFoundError:
            raise BadSample(f"image {self.path} does not exist") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, BadSample):
                raise
            raise BadSample(f"image {self.path} cannot be decoded: {error}") from None

    def check(self) -> None:
        """Look at the file's head and tail, decoding it only where they do not tell. Raises BadSample."""
        try:
            with open(self.path, "rb") as file:
                head = file.read(8)
                file.seek(max(-64, -file.seek(0, os.SEEK_END)), os.SEEK_END)
                tail = file.read()
        except FileNotFoundError:
            raise BadSample(f"image {self.path} does not exist") from None
        except (OSError, ValueError) as error:
            raise BadSample(f"image {self.path} cannot be read: {error}") from None
        ends = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(head[:2])
        if ends is None or ends not in tail:
            self.load()  # no cheap end mark, or it is missing or hidden (cameras append data of their own)


ImageFile.LOAD_TRUNCATED_IMAGES = False


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright (EXIF), first frame, transparency laid on white.

    Raises ValueError for pixels whose range is not known.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # 16-bit grey: `convert` would clip, not scale
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError("grey values of more than 16 bits")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("grey values in floating point")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def fit_image(image: Image.Image, size: tuple[int, int], fit: str, mean: tuple[float, ...]) -> Image.Image:
    """Bring a picture to `size` ``(H, W)``.

    squash: stretch. crop: scale the shorter side, cut the centre (CLIP's own way).
    pad: scale the longer side, fill the rest with the mean colour (LLaVA-1.5).
    """
    height, width = size
    if image.size == (width, height):
        return image
    if fit == "squash":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    if fit == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    assert fit == "pad", fit
    colour = tuple(round(255 * channel) for channel in mean)
    return ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, color=colour)


def to_tensor(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(3, H, W)`` float32, normalised by channel mean and standard deviation of values in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    return pixels.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
