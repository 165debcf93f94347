"""`Processor`: conversations in, what the model receives out. Training and inference share it.

Conversation -> Sample (tokens, targets, pictures) -> Batch (padded tensors)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .images import FITS, fit_image, to_tensor
from .records import BadSample, Conversation
from .rendering import IGNORE, Rendered, Renderer


class Sample(NamedTuple):
    """One rendered conversation and its pictures ``(N, 3, H, W)``."""

    id: str
    tokens: Rendered
    images: Tensor


class Batch(NamedTuple):
    """What the model receives; B rows padded on the right to T positions.

    input_ids ``(B, T)``; targets ``(B, T)``, -100 where none; weights ``(B, T)`` float32;
    images ``(N, 3, H, W)``, a stand-in where the batch has no picture, None without a geometry; is_image ``(B, T)``
    bool, or None for a batch without pictures; lengths ``(B,)``.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    images: Tensor | None
    is_image: Tensor | None
    lengths: Tensor

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        moved = [t if t is None else t.to(device, non_blocking=True) for t in self]
        batch = Batch(*moved)
        return batch if dtype is None or batch.images is None else batch._replace(images=batch.images.to(dtype))


@dataclass(frozen=True)
class Geometry:
    """How pictures reach the encoder, and how many tokens each becomes.

    size ``(H, W)`` in pixels; fit: ``squash``, ``pad`` or ``crop``; mean, std: of the channels in [0, 1].
    """

    size: tuple[int, int]
    fit: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens: int

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"image_fit={self.fit}: expected one of {', '.join(FITS)}")


class Processor:
    """Turns conversations into samples and batches.

    geometry: how pictures reach the encoder; None where there is none, so that pictures are bad samples.
    template, fallback: see `Renderer`; max_length: longest sequence in tokens, pictures included.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        geometry: Geometry | None,
        template: str,
        max_length: int,
        fallback: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.fallback = fallback
        self.renderer = Renderer(tokenizer, template, max_length, fallback)
        self.filler = self.renderer.filler

    def __call__(self, conversation: Conversation) -> Sample:
        """Render a conversation for training. Raises BadSample, naming it."""
        tokens = self.renderer.render(conversation, self._token_counts(conversation))
        return Sample(conversation.id, tokens, self._pictures(conversation))

    def prompt(self, conversation: Conversation) -> Sample:
        """Render a conversation that ends with a user turn, up to the answer asked for."""
        tokens = self.renderer.prompt(conversation, self._token_counts(conversation))
        return Sample(conversation.id, tokens, self._pictures(conversation))

    def _token_counts(self, conversation: Conversation) -> list[int]:
        if conversation.images and self.geometry is None:
            raise BadSample(f"{conversation.id}: a picture, but there is no vision encoder to see it")
        return [self.geometry.tokens for _ in conversation.images]

    def _pictures(self, conversation: Conversation) -> Tensor:
        geometry = self.geometry
        if geometry is None:
            return torch.empty(0)
        pictures = []
        for source in conversation.images:
            try:
                picture = fit_image(source.load(), geometry.size, geometry.fit, geometry.mean)
            except BadSample as error:
                raise BadSample(f"{conversation.id}: {error}") from None
            pictures.append(to_tensor(picture, geometry.mean, geometry.std))
        return torch.stack(pictures) if pictures else torch.empty(0, 3, *geometry.size)

    def collate(self, samples: list[Sample], rows: int = 0) -> Batch:
        """Pad samples to one batch, topped up to `rows` rows of no weight.

        Pictures that a row's tokens no longer show (a prompt cut before them) must not be in `samples`.
        """
        rows = max(rows, len(samples), 1)
        width = max((len(s.tokens) for s in samples), default=1)
        input_ids = torch.full((rows, width), self.filler)
        targets = torch.full((rows, width), IGNORE)
        weights = torch.zeros(rows, width)
        is_image = torch.zeros(rows, width, dtype=torch.bool)
        lengths = torch.ones(rows, dtype=torch.long)
        for row, sample in enumerate(samples):
            tokens, length = sample.tokens, len(sample.tokens)
            input_ids[row, :length] = tokens.input_ids
            targets[row, :length] = tokens.targets
            weights[row, :length] = tokens.weights
            is_image[row, :length] = tokens.image_index >= 0
            lengths[row] = length
        images = torch.cat([s.images for s in samples]) if samples else torch.empty(0)
        if len(images) > 0:
            return Batch(input_ids, targets, weights, images, is_image, lengths)
        stand_in = torch.zeros(1, 3, *self.geometry.size) if self.geometry else None
        return Batch(input_ids, targets, weights, stand_in, None, lengths)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer and settings into ``folder/processor``."""
        folder = Path(folder) / "processor"
        self.tokenizer.save_pretrained(folder)
        settings = {
            "template": self.renderer.template,
            "fallback": self.fallback,
            "max_length": self.renderer.max_length,
            "geometry": asdict(self.geometry) if self.geometry else None,
        }
        (folder / "processor.json").write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """Load the processor of a model folder. Raises ValueError if it has none."""
        folder = Path(folder) / "processor"
        try:
            settings = json.loads((folder / "processor.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder.parent} is not a model folder: processor/processor.json is missing") from None
        saved = settings.pop("geometry")
        geometry = saved and Geometry(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
        return cls(AutoTokenizer.from_pretrained(folder), geometry, **settings)
