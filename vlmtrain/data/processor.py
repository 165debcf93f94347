"""`Processor`: conversations in, what the model receives out. Training and inference share it.

Conversation -> Sample (tokens, targets, pictures) -> Batch (padded tensors)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import first_line
from ..model.folder import check_files
from ..tiling import Tiles, choose_tiles, tiled_tokens
from .connector_text import TextReader, pad_texts
from .images import FITS, cut_tiles, fit_image, to_tensor
from .records import BadSample, Conversation
from .rendering import IGNORE, Rendered, Renderer

OWN_TOKENIZER = "connector_tokenizer"  # of a connector that reads text in another vocabulary


class Sample(NamedTuple):
    """One rendered conversation and its pictures ``(N, 3, H, W)``.

    With tiles, `images` has the views of each picture one after the other, and `tiles` says how many those are.
    texts: for a connector that reads text, the ids ``(L,)`` that go with each of `images`.
    """

    id: str
    tokens: Rendered
    images: Tensor
    tiles: tuple[Tiles, ...] | None = None
    texts: tuple[Tensor, ...] = ()


class Batch(NamedTuple):
    """What the model receives; B rows padded on the right to T positions.

    input_ids ``(B, T)``; targets ``(B, T)``, -100 where none; weights ``(B, T)`` float32;
    images ``(N, 3, H, W)``, a stand-in where the batch has no picture, None without a geometry; is_image ``(B, T)``
    bool, or None for a batch without pictures; lengths ``(B,)``.

    A packed batch has one row of several samples: positions ``(1, T)``, from 0 in each; boundaries ``(S + 1,)``
    int32, where each of its S samples starts, and the row's end. Both are None otherwise. tiles: how each picture is
    cut, one after the other, where pictures are. text_ids ``(N, L)``, text_mask ``(N, L)`` bool: what a connector that
    reads text reads with each of `images`, else None. keys: the name by which a cache knows each of `images`, or None.
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
    """How pictures reach the encoder, and how many tokens each becomes.

    size ``(H, W)`` in pixels; fit: ``squash``, ``pad``, ``crop`` or ``tiles``; mean, std: of the channels in [0, 1].
    tokens, grid: what the encoder and the connector make of a view; grid is None where the tokens have no order.
    tile_grids: for ``tiles``, the ``(rows, columns)`` that a picture may be cut into; tiles_most: as many tiles' tokens
    it keeps at most, 0 for all; tiles_alone: whether only pictures that are alone in their sample are cut.
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
        """How a picture of `size` ``(H, W)``, one of so many in its sample, is cut; None without ``tiles``."""
        if self.fit != "tiles":
            return None
        if self.tiles_alone and pictures > 1:
            return Tiles(0, 0, *size)
        return choose_tiles(size, self.size, self.tile_grids, self.tiles_most)

    def views(self, picture: Image.Image, tiles: Tiles | None) -> list[Image.Image]:
        """What the encoder is shown of a picture that is cut like this."""
        if tiles is None:
            return [fit_image(picture, self.size, self.fit, self.mean)]
        if tiles.views == 1:
            return [fit_image(picture, self.size, "pad", self.mean)]
        return cut_tiles(picture, self.size, tiles)

    def token_count(self, tiles: Tiles | None) -> int:
        """Tokens of a picture that is cut like this."""
        return self.tokens if tiles is None else tiled_tokens(tiles, self.tokens, self.grid)

    @property
    def most_tokens(self) -> int:
        """Tokens of the picture that makes the most."""
        height, width = self.size
        cuts = [
            Tiles(rows, columns, rows * height, columns * width, self.tiles_most) for rows, columns in self.tile_grids
        ]
        return max(self.token_count(cut) for cut in cuts or [None])


class Processor:
    """Turns conversations into samples and batches.

    geometry: how pictures reach the encoder; None where there is none, so that pictures are bad samples.
    template, fallback: see `Renderer`; max_length: longest sequence in tokens, pictures included.
    reader: for a connector that reads text. in_pairs: whether a sample is one picture and one text; others are bad.
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
        self.names_pictures = False  # whether batches say by which name a cache knows their pictures
        self.renderer = Renderer(tokenizer, template, max_length, fallback)
        self.filler = self.renderer.filler

    def __call__(self, conversation: Conversation) -> Sample:
        """A conversation as training sees it. Raises BadSample, naming it."""
        return self.load(conversation, self.render(conversation))

    def render(self, conversation: Conversation) -> Rendered:
        """The tokens alone; no picture is decoded. Raises BadSample, naming the conversation."""
        if self.in_pairs and len(conversation.images) != 1:
            raise BadSample(f"{conversation.id}: {len(conversation.images)} pictures, but each text is paired with one")
        return self.renderer.render(conversation, self._token_counts(conversation))

    def load(self, conversation: Conversation, tokens: Rendered) -> Sample:
        """Rendered tokens with the conversation's pictures. Raises BadSample, naming it."""
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
        """Render a conversation that ends with a user turn, up to the answer asked for."""
        return self.load(conversation, self.renderer.prompt(conversation, self._token_counts(conversation)))

    def _token_counts(self, conversation: Conversation) -> list[int]:
        if conversation.images and self.geometry is None:
            raise BadSample(f"{conversation.id}: a picture, but there is no vision encoder to see it")
        if not conversation.images or self.geometry.fit != "tiles":
            return [self.geometry.token_count(None) for _ in conversation.images]
        with _naming(conversation):
            sizes = [picture.size() for picture in conversation.images]
        return [self.geometry.token_count(self.geometry.tiles(size, len(sizes))) for size in sizes]

    def decode(self, conversation: Conversation) -> list[Image.Image]:
        """A conversation's pictures as they are. Raises BadSample, naming it, for one that is missing or broken."""
        with _naming(conversation):
            return [source.load() for source in conversation.images]

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
        return self._batch(samples, input_ids, targets, weights, is_image, lengths)

    def pack(self, samples: list[Sample]) -> Batch:
        """Samples behind one another in a single row; a row of one position and no weight if there are none."""
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
        """Write tokenizer and settings into ``folder/processor``."""
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
        """Load the processor of a model folder. Raises ValueError if it has none."""
        check_files(Path(folder), "processor")
        folder = Path(folder) / "processor"
        file = folder / "processor.json"
        try:
            settings = json.loads(file.read_text())
            saved, reader = settings.pop("geometry"), settings.pop("reader", None)
        except FileNotFoundError:
            raise ValueError(f"{folder.parent} is not a model folder: processor/processor.json is missing") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is not what a processor was saved as: {first_line(error)}") from None
        geometry = saved and Geometry(**{key: _as_tuple(value) for key, value in saved.items()})
        tokenizer = _saved_tokenizer(folder)
        if reader:
            own = folder / OWN_TOKENIZER
            reader = TextReader(_saved_tokenizer(own) if own.exists() else tokenizer, **reader)
        return cls(tokenizer, geometry, **settings, reader=reader)


def _saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder / 'tokenizer.json'} is missing: the model folder has no tokenizer")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def picture_key(view: Tensor) -> str:
    """Name of a view ``(3, H, W)``: the hash of its pixels."""
    return hashlib.blake2b(view.contiguous().numpy(), digest_size=16).hexdigest()


@contextmanager
def _naming(conversation: Conversation) -> Iterator[None]:
    """Say whose picture is bad."""
    try:
        yield
    except BadSample as error:
        raise BadSample(f"{conversation.id}: {error}") from None


def _as_tuple(value: object) -> object:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
