"""`Processor`: converts conversations into the model's inputs, for training and inference.

Conversation -> Sample (tokens, targets, images) -> Batch (padded tensors)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import first_line
from ..files import read_object
from ..model.folder import check_files
from ..tiling import Tiles, choose_tiles, tiled_tokens
from .connector_text import TextReader, pad_texts
from .images import FITS, cut_tiles, fit_image, to_tensor
from .records import BadSample, Conversation
from .rendering import IGNORE, Rendered, Renderer

OWN_TOKENIZER = "connector_tokenizer"  # tokenizer of a connector that reads text in a separate vocabulary


class Sample(NamedTuple):
    """One rendered conversation and its images ``(N, 3, H, W)``.

    With tiles, `images` contains the concatenated views of all images, and `tiles` how each image is cut.
    texts: for a connector that reads text, the ids ``(L,)`` for each of `images`.
    """

    id: str
    tokens: Rendered
    images: Tensor
    tiles: tuple[Tiles, ...] | None = None
    texts: tuple[Tensor, ...] = ()


class Batch(NamedTuple):
    """The model's input; B rows padded on the right to T positions.

    Targets are already shifted: ``targets[:, t]`` is the token after position t, which the logits at t predict. Compare
    logits and targets as they are, and do not shift them again (Hugging Face's ``labels`` are not shifted).

    input_ids ``(B, T)``; targets ``(B, T)``, -100 if there is none; weights ``(B, T)`` float32, the loss weight of each
    target, 0 if there is none;
    images ``(N, 3, H, W)``, a dummy image if the batch has no images, None without a geometry; is_image ``(B, T)``
    bool, or None for a batch without images; lengths ``(B,)``.

    A packed batch has one row of several samples: positions ``(1, T)``, starting at 0 in each sample; boundaries
    ``(S + 1,)`` int32, the start of each of the S samples and the end of the row. Both are None otherwise. tiles: how
    each image is cut, in order, if images are cut into tiles. text_ids ``(N, L)``, text_mask ``(N, L)`` bool: the text
    for each of `images` if the connector reads text, else None. keys: the cache key of each of `images`, or None.
    ids: of the samples.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    images: Tensor | None
    is_image: Tensor | None
    lengths: Tensor
    positions: Tensor | None = None
    boundaries: Tensor | None = None
    tiles: tuple[Tiles, ...] | None = None
    text_ids: Tensor | None = None
    text_mask: Tensor | None = None
    keys: tuple[str, ...] | None = None
    ids: tuple[str, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        batch = Batch(*(t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in self))
        return batch if dtype is None or batch.images is None else batch._replace(images=batch.images.to(dtype))


@dataclass(frozen=True)
class Geometry:
    """How images are prepared for the encoder, and how many tokens each becomes.

    size ``(H, W)`` in pixels; fit: ``squash``, ``pad``, ``crop`` or ``tiles``; mean, std: of the channels in [0, 1].
    tokens, grid: number and grid of the tokens of one view; grid is None if the tokens form none.
    tile_grids: for ``tiles``, the ``(rows, columns)`` into which an image may be cut; tiles_most: maximum number of
    tiles whose tokens are kept, 0 for all; tiles_alone: whether an image is cut only if its sample has no other image.
    """

    size: tuple[int, int]
    fit: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens: int
    grid: tuple[int, int] | None = None
    tile_grids: tuple[tuple[int, int], ...] = ()
    tiles_most: int = 0
    tiles_alone: bool = False

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"image_fit={self.fit}: expected one of {', '.join(FITS)}")
        if self.fit == "tiles" and not (self.tile_grids and all(min(grid) > 0 for grid in self.tile_grids)):
            raise ValueError(
                f"image_fit=tiles needs image_tiles, a list of [rows, columns], got {list(self.tile_grids)}"
            )

    def tiles(self, size: tuple[int, int], pictures: int) -> Tiles | None:
        """How an image of `size` ``(H, W)`` is cut in a sample of that many `pictures`; None without ``tiles``."""
        if self.fit != "tiles":
            return None
        if self.tiles_alone and pictures > 1:
            return Tiles(0, 0, *size)
        return choose_tiles(size, self.size, self.tile_grids, self.tiles_most)

    def views(self, picture: Image.Image, tiles: Tiles | None) -> list[Image.Image]:
        """The encoder's views of an image that is cut into `tiles`."""
        if tiles is None:
            return [fit_image(picture, self.size, self.fit, self.mean)]
        if tiles.views == 1:
            return [fit_image(picture, self.size, "pad", self.mean)]
        return cut_tiles(picture, self.size, tiles)

    def token_count(self, tiles: Tiles | None) -> int:
        """Number of tokens of an image that is cut into `tiles`."""
        return self.tokens if tiles is None else tiled_tokens(tiles, self.tokens, self.grid)

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens of any image."""
        height, width = self.size
        cuts = [
            Tiles(rows, columns, rows * height, columns * width, self.tiles_most) for rows, columns in self.tile_grids
        ]
        return max(self.token_count(cut) for cut in cuts or [None])


class Processor:
    """Turns conversations into samples and batches.

    geometry: how images are prepared for the encoder; None if there is no encoder, so samples with images are bad.
    template, fallback: see `Renderer`; max_length: maximum sequence length in tokens, including images.
    reader: for a connector that reads text. in_pairs: whether a sample must be one image and one text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        geometry: Geometry | None,
        template: str,
        max_length: int,
        fallback: str | None = None,
        reader: TextReader | None = None,
        in_pairs: bool = False,
    ):
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.fallback = fallback
        self.reader, self.in_pairs = reader, in_pairs
        self.max_length = max_length
        self.names_pictures = False  # whether batches contain the cache keys of their images
        self.renderer = Renderer(tokenizer, template, max_length, fallback)
        self.filler = self.renderer.filler

    def __call__(self, conversation: Conversation) -> Sample:
        """Convert a conversation to a training sample. Raises BadSample, naming the conversation."""
        return self.load(conversation, self.render(conversation))

    def render(self, conversation: Conversation) -> Rendered:
        """Render only the tokens, without decoding images. Raises BadSample, naming the conversation."""
        if self.in_pairs and len(conversation.images) != 1:
            raise BadSample(f"{conversation.id}: {len(conversation.images)} images, expected one per text")
        return self.renderer.render(conversation, self._token_counts(conversation))

    def load(self, conversation: Conversation, tokens: Rendered) -> Sample:
        """Add the conversation's images to its rendered tokens. Raises BadSample, naming the conversation."""
        geometry = self.geometry
        if geometry is None:
            return Sample(conversation.id, tokens, torch.empty(0))
        views, cuts, texts = [], [], []
        words = self.reader(conversation) if self.reader else None
        for number, picture in enumerate(self.decode(conversation)):
            tiles = geometry.tiles((picture.height, picture.width), len(conversation.images))
            if words:
                texts += [words[number]] * (tiles.views if tiles else 1)
            views += geometry.views(picture, tiles)
            cuts.append(tiles)
        tensors = [to_tensor(view, geometry.mean, geometry.std) for view in views]
        images = torch.stack(tensors) if tensors else torch.empty(0, 3, *geometry.size)
        return Sample(conversation.id, tokens, images, tuple(cuts) if geometry.fit == "tiles" else None, tuple(texts))

    def prompt(self, conversation: Conversation) -> Sample:
        """Render a conversation that ends with a user turn, up to the start of the answer."""
        return self.load(conversation, self.renderer.prompt(conversation, self._token_counts(conversation)))

    def _token_counts(self, conversation: Conversation) -> list[int]:
        if conversation.images and self.geometry is None:
            raise BadSample(f"{conversation.id}: the sample has an image, but there is no vision encoder")
        if not conversation.images or self.geometry.fit != "tiles":
            return [self.geometry.token_count(None) for _ in conversation.images]
        with _naming(conversation):
            sizes = [picture.size() for picture in conversation.images]
        return [self.geometry.token_count(self.geometry.tiles(size, len(sizes))) for size in sizes]

    def decode(self, conversation: Conversation) -> list[Image.Image]:
        """Decode a conversation's images at their own size. Raises BadSample if one is missing or broken."""
        with _naming(conversation):
            return [source.load() for source in conversation.images]

    def collate(self, samples: list[Sample], rows: int = 0) -> Batch:
        """Pad samples to one batch, with additional rows of zero weight up to `rows` rows.

        Images that are not in the tokens of a row (because a prompt was cut before them) must not be in `samples`.
        """
        empty = Rendered(torch.tensor([self.filler]), torch.tensor([IGNORE]), torch.zeros(1), torch.tensor([-1]), ())
        tokens = [sample.tokens for sample in samples]
        tokens += [empty] * (max(rows, 1) - len(samples))
        pad = partial(pad_sequence, batch_first=True)
        return self._batch(
            samples,
            input_ids=pad([t.input_ids for t in tokens], padding_value=self.filler),
            targets=pad([t.targets for t in tokens], padding_value=IGNORE),
            weights=pad([t.weights for t in tokens]),
            is_image=pad([t.image_index >= 0 for t in tokens]),
            lengths=torch.tensor([len(t) for t in tokens]),
        )

    def pack(self, samples: list[Sample]) -> Batch:
        """Concatenate samples in a single row; without samples, a row of one position with zero weight."""
        if not samples:
            return self.collate([], rows=1)
        tokens = [sample.tokens for sample in samples]
        lengths = torch.tensor([len(t) for t in tokens])
        ends = lengths.cumsum(0)
        starts = torch.repeat_interleave(ends - lengths, lengths)
        batch = self._batch(
            samples,
            input_ids=torch.cat([t.input_ids for t in tokens])[None],
            targets=torch.cat([t.targets for t in tokens])[None],
            weights=torch.cat([t.weights for t in tokens])[None],
            is_image=torch.cat([t.image_index >= 0 for t in tokens])[None],
            lengths=ends[-1:],
        )
        positions = (torch.arange(int(ends[-1])) - starts)[None]
        return batch._replace(positions=positions, boundaries=F.pad(ends, (1, 0)).int())

    def _batch(self, samples: list[Sample], input_ids, targets, weights, is_image, lengths) -> Batch:
        images = torch.cat([s.images for s in samples]) if samples else torch.empty(0)
        tiles = tuple(cut for sample in samples for cut in sample.tiles or ()) or None
        texts = [text for sample in samples for text in sample.texts]
        if len(images) == 0:
            images, is_image = torch.zeros(1, 3, *self.geometry.size) if self.geometry else None, None
            texts = [self.reader.encode("")] if self.reader else []
        ids, mask = pad_texts(texts) if self.reader else (None, None)
        keys = tuple(map(picture_key, images)) if self.names_pictures and is_image is not None else None
        batch = Batch(input_ids, targets, weights, images, is_image, lengths, tiles=tiles, text_ids=ids, text_mask=mask)
        return batch._replace(keys=keys, ids=tuple(sample.id for sample in samples))

    def save_pretrained(self, folder: str | Path) -> None:
        """Save tokenizer and settings in ``folder/processor``."""
        folder = Path(folder) / "processor"
        self.tokenizer.save_pretrained(folder)
        settings = {
            "template": self.renderer.template,
            "fallback": self.fallback,
            "max_length": self.max_length,
            "geometry": asdict(self.geometry) if self.geometry else None,
            "reader": None,
        }
        if self.reader:
            settings["reader"] = {"reads": self.reader.reads, "max_length": self.reader.max_length}
            if self.reader.tokenizer is not self.tokenizer:
                self.reader.tokenizer.save_pretrained(folder / OWN_TOKENIZER)
        (folder / "processor.json").write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """Load the processor of a model folder. Raises ValueError if the folder has none."""
        check_files(Path(folder), "processor")
        folder = Path(folder) / "processor"
        file = folder / "processor.json"
        if not file.exists():
            raise ValueError(f"{folder.parent} is not a model folder: processor/processor.json is missing")
        settings = read_object(file)
        tokenizer = _saved_tokenizer(folder)
        try:
            saved, reader = settings.pop("geometry"), settings.pop("reader", None)
            if type(settings.get("max_length")) is not int:
                raise ValueError(f"max_length={settings.get('max_length')}: expected an integer")
            geometry = saved and Geometry(**{key: as_tuple(value) for key, value in saved.items()})
            if reader:
                own = folder / OWN_TOKENIZER
                reader = TextReader(_saved_tokenizer(own) if own.exists() else tokenizer, **reader)
            return cls(tokenizer, geometry, **settings, reader=reader)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is not a saved processor: {first_line(error)}") from None


def _saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder / 'tokenizer.json'} is missing: the model folder has no tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot read
        raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {first_line(error)}") from None


def picture_key(view: Tensor) -> str:
    """Cache key of a view ``(3, H, W)``: the hash of its pixels."""
    return hashlib.blake2b(view.contiguous().numpy(), digest_size=16).hexdigest()


@contextmanager
def _naming(conversation: Conversation) -> Iterator[None]:
    """Add the conversation's id to errors about its images."""
    try:
        yield
    except BadSample as error:
        raise BadSample(f"{conversation.id}: {error}") from None


def as_tuple(value: object) -> object:
    """Nested lists, as JSON has them, as tuples; other values unchanged."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value
