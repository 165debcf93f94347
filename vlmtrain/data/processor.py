"""`Processor`: converts conversations into the model's inputs, for training and inference.

Conversation --plan--> items and placements --render--> tokens and targets --load--> Sample --collate--> Batch
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..batch import Batch, Decoder, Targets
from ..connectors.checks import GridError
from ..errors import first_line
from ..files import read_object
from ..model.folder import check_files
from ..model.vision.base import packed, stacked
from ..visual import CAUSAL, NO_MEDIA, Cached, MediaPlan, Seen, Texts, Visual, joined, normalized
from .actions import Binning
from .boxes import Writing, write_regions
from .cached_features import FeatureFiles, ItemFeatures
from .connector_text import TextReader, pad_texts
from .geometry import Geometry
from .media import decode_frames, show_medium
from .record_actions import write_actions
from .records import BadSample, Conversation, is_video
from .rendered import IGNORE, Rendered, SampleLength
from .rendering import RENDERING, Renderer

OWN_TOKENIZER = "connector_tokenizer"  # tokenizer of a connector that reads text in a separate vocabulary


class Sample(NamedTuple):
    """One rendered conversation, or several about the same images, and what its items show.

    pixels: for each encoder, one tensor ``(3, H, W)`` per item, uint8; normalized pixels in floating point are also
    possible. texts: for a connector that reads text, the ids ``(L,)`` for each item. cached: for each encoder, what its
    feature cache has of each item, empty without one; the pixels of an encoder with a cache are those of the items
    without features. source: number of the data source.
    """

    id: str
    tokens: Rendered
    pixels: tuple[tuple[Tensor, ...], ...]
    texts: tuple[Tensor, ...] = ()
    cached: tuple[tuple[ItemFeatures, ...], ...] = ()
    source: int = 0

    @classmethod
    def tree(cls, samples: Sequence[Sample]) -> Sample:
        """Samples that show the same images as one, see `Rendered.tree`."""
        tokens = Rendered.tree([sample.tokens for sample in samples])
        return samples[0]._replace(id=", ".join(sample.id for sample in samples), tokens=tokens)

    def cut(self, tokens: Rendered) -> Sample:
        """The sample with other tokens, which end earlier, and the items that they refer to."""
        media = tokens.media.first(int(tokens.index.max()) + 1 if len(tokens) else 0)
        count = len(media.items)
        cached = tuple(items[:count] for items in self.cached)
        read = [sum(item.features is not None for item in items) for items in cached] or [0] * len(self.pixels)
        pixels = tuple(pixels[: count - found] for pixels, found in zip(self.pixels, read))
        tokens = replace(tokens, media=media)
        return self._replace(tokens=tokens, pixels=pixels, texts=self.texts[:count], cached=cached)


class Processor:
    """Turns conversations into samples and batches.

    geometry: how images are prepared for the encoder; None if there is no encoder, so samples with images are bad.
    template, fallback: see `Renderer`; max_length: maximum sequence length in tokens, including images.
    reader: for a connector that reads text. in_pairs: whether a sample must be one image and one text. positions: see
    `Renderer`. encoder_batch_size: `VisionEncoder.batch_size` of the encoder. share_images: whether a sample may have
    several dialogues. boxes: how boxes and points are written; None if samples with them are bad. actions: how
    actions are written; None if samples with them are bad. attention: one of `vlmtrain.visual.ATTENTION`.
    decoder_start: see `Renderer`.
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
        positions: str | None = None,
        encoder_batch_size: int | None = None,
        share_images: bool = False,
        boxes: Writing | None = None,
        attention: str = CAUSAL,
        decoder_start: int | None = None,
        actions: Binning | None = None,
    ):
        self.tokenizer, self.positions, self.boxes, self.attention = tokenizer, positions, boxes, attention
        self.share_images, self.actions = share_images, actions
        self.geometry = geometry
        self.fallback = fallback
        self.reader, self.in_pairs = reader, in_pairs
        self.max_length = max_length
        self.features: tuple[FeatureFiles | None, ...] = ()
        self.encoder_batch_size = encoder_batch_size
        controls = geometry.controls if geometry else ()
        self._controls = torch.tensor(tokenizer.convert_tokens_to_ids(list(controls)), dtype=torch.long)
        allowed = {"allowed": boxes.tokens} if boxes else {}
        more = {"decoder_start": decoder_start}
        if geometry:
            more |= {"slot": geometry.slot_token, "newline": geometry.newline or None, "shared": geometry.frame_shared}
        self.renderer = Renderer(tokenizer, template, max_length, fallback, positions, controls, **allowed, **more)
        self.filler = self.renderer.filler

    def __call__(self, conversation: Conversation) -> Sample:
        """Convert a conversation to a training sample. Raises BadSample, naming the conversation."""
        return self.load(conversation, self.render(conversation))

    def reading(self, *features: FeatureFiles | None) -> Processor:
        """A processor that is the same, but loads the cached features of encoders instead of images.

        features: for each encoder, None without a cache.
        """
        other = copy(self)
        other.features = features
        return other

    def plan(self, conversation: Conversation, room: int | None = None) -> MediaPlan:
        """The items and placements of a conversation's media, from their headers. Raises BadSample, naming it.

        room: maximum number of tokens of each video.
        """
        if not conversation.media:
            return NO_MEDIA
        if self.geometry is None:
            raise BadSample(f"{conversation.id}: the sample has an image, but the model has no vision encoder")
        with _naming(conversation):
            facts = [
                medium.probe() if is_video(medium) else medium.size() if self.geometry.reads_sizes else None
                for medium in conversation.media
            ]
            try:
                return self.geometry.plan(facts, room)
            except GridError as error:
                raise BadSample(str(error)) from None

    def written(self, conversation: Conversation) -> Conversation:
        """The conversation with its boxes, points and actions as text. Raises BadSample, naming it."""
        if conversation.actions:
            if self.actions is None:
                raise BadSample(f"{conversation.id}: the sample has actions, but actions.bins is not set")
            conversation = write_actions(conversation, self.actions)
        if not conversation.regions:
            return conversation
        if self.boxes is None:
            raise BadSample(f"{conversation.id}: the sample has boxes or points, but boxes.format is not set")
        if self.geometry is None:
            raise BadSample(f"{conversation.id}: the sample has an image, but the model has no vision encoder")
        images = {number: medium for number, medium in enumerate(conversation.media) if not is_video(medium)}
        views = {}
        with _naming(conversation):
            for _, number in conversation.regions:
                if number not in images:
                    raise BadSample(f"a box or a point is in medium {number}, which is not an image")
                views[number] = self.geometry.map(images[number].size(), len(conversation.media))
        return write_regions(conversation, self.boxes, views.__getitem__)

    def render(self, conversation: Conversation, plan: MediaPlan | None = None, place: float | None = None) -> Rendered:
        """Render only the tokens, without decoding images. Raises BadSample, naming the conversation.

        plan: of the media of a single dialogue; None for the one that fits it. place: see `Renderer.render`.
        """
        if self.in_pairs and len(conversation.media) != 1:
            raise BadSample(f"{conversation.id}: {len(conversation.media)} images, expected one per text")
        if conversation.others:
            return self._tree(conversation)
        written = self.written(conversation)
        return self.renderer.render(written, self.fitted(written) if plan is None else plan, place)

    def fitted(self, conversation: Conversation) -> MediaPlan:
        """The plan of a conversation, with fewer or smaller frames if its videos leave no room for its text."""
        plan = self.plan(conversation)
        videos = [number for number, medium in enumerate(conversation.media) if is_video(medium)]
        # the length is known faster than the rendered conversation, unless it is too long
        if not videos or self.renderer.lengths([conversation], [plan]) != [None]:
            return plan
        excess = self.renderer.excess(conversation, plan)
        if excess <= 0:
            return plan
        # Text grows with the number of frames if each has a time, so the largest room that fits is searched.
        least, most, best = 1, max(sum(place.slots for _, place in plan.by_medium[number]) for number in videos), None
        while least <= most:
            room = (least + most) // 2
            try:
                plan = self.plan(conversation, room)
            except BadSample:  # not even one frame
                least = room + 1
                continue
            excess = self.renderer.excess(conversation, plan)
            least, most, best = (room + 1, most, plan) if excess <= 0 else (least, room - 1, best)
        if best is None:
            raise BadSample(
                f"{conversation.id}: with a single frame of each video, it has {self.max_length + excess} tokens, more "
                f"than max_length={self.max_length}"
            )
        return best

    def _tree(self, conversation: Conversation) -> Rendered:
        """Several dialogues as a tree, without the last ones if they exceed `max_length`."""
        if not self.share_images:
            raise BadSample(
                f"{conversation.id}: several dialogues about the same images need the stage's layout=packed and "
                "share_images=true"
            )
        first, *others = map(self.render, conversation.dialogues)
        if conversation.media and not first.shared:
            raise BadSample(f"{conversation.id}: an answer before the last image cannot be shared by several dialogues")
        for number, each in enumerate(others, 2):
            if each.beginning != first.beginning:
                raise BadSample(
                    f"{conversation.id}: dialogues 1 and {number} differ in their images or the text before them"
                )
        lengths = accumulate((len(each) - each.shared for each in (first, *others)), initial=first.shared)
        kept = sum(length <= self.max_length for length in lengths) - 1
        return Rendered.tree([first, *others][:kept])

    def lengths(self, conversations: Sequence[Conversation]) -> list[SampleLength | None]:
        """The lengths of conversations without rendering them, which is faster.

        None where only rendering can tell, and for bad ones.
        """
        found: list[SampleLength | None] = [None] * len(conversations)
        plans, texts = {}, []
        for number, conversation in enumerate(conversations):
            if conversation.others or (self.in_pairs and len(conversation.media) != 1):
                continue
            with suppress(BadSample):
                written, plan = self.written(conversation), self.plan(conversation)
                texts.append(written)
                plans[number] = plan
        tokens = self.renderer.lengths(texts, list(plans.values()))
        for (number, plan), count in zip(plans.items(), tokens):
            found[number] = None if count is None else SampleLength.of(count, plan)
        return found

    def load(self, conversation: Conversation, tokens: Rendered) -> Sample:
        """Load what the conversation's rendered tokens say about its images. Raises BadSample, naming it."""
        geometry, items = self.geometry, tokens.media.items
        if geometry is None:
            return Sample(conversation.id, tokens, ())
        pixels: list[list[Tensor]] = [[] for _ in geometry.mean_std]
        cached: list[list[ItemFeatures]] = [[] for _ in self.features]
        files = {encoder: files for encoder, files in enumerate(self.features) if files is not None}
        with _naming(conversation):
            for number, medium in enumerate(conversation.media):
                own = [item for item in items if item.medium == number]
                if not own:  # cut off
                    continue
                found = {encoder: each.find(medium, own, geometry, encoder) for encoder, each in files.items()}
                means = {i: mean for i, (mean, _) in enumerate(geometry.mean_std) if found.get(i) is None}
                shown = show_medium(medium, own, means)
                for encoder, of_encoder in shown.items():
                    if encoder in files:
                        named = files[encoder].named(of_encoder, medium, own, geometry, encoder)
                        found[encoder] = named
                        of_encoder = [image for image, each in zip(of_encoder, named) if each.features is None]
                    pixels[encoder] += of_encoder
                for encoder, features in found.items():
                    cached[encoder] += features
        words = self.reader(self.written(conversation)) if self.reader else []
        texts = tuple(words[item.medium] for item in items if words)
        return Sample(conversation.id, tokens, tuple(map(tuple, pixels)), texts, tuple(map(tuple, cached)))

    def prompt(self, conversation: Conversation) -> Sample:
        """Render a conversation that ends with a user turn, up to the start of the answer."""
        written = self.written(conversation)
        return self.load(written, self.render_prompt(written))

    def render_prompt(self, conversation: Conversation) -> Rendered:
        """Render only the tokens of a prompt, without decoding images. Raises BadSample, naming the conversation."""
        written = self.written(conversation)
        return self.renderer.prompt(written, self.fitted(written))

    def decode(self, conversation: Conversation, plan: MediaPlan) -> Iterator[Image.Image]:
        """Decode a conversation's images and the frames that are shown of its videos, at their own size.

        Raises BadSample if one is missing or broken.
        """
        with _naming(conversation):
            for number, medium in enumerate(conversation.media):
                items = [item for item in plan.items if item.medium == number]
                if not items:  # cut off
                    continue
                yield from decode_frames(medium, items) if is_video(medium) else [medium.load()]

    def chunks(self, items: int) -> int:
        """Number of chunks in which the encoder processes so many items."""
        return -(-max(1, items) // self.encoder_batch_size) if self.encoder_batch_size else 1

    def collate(self, samples: list[Sample], rows: int = 0, calls: int = 1, chunks: int = 1) -> Batch:
        """Pad samples to one batch, with additional rows of zero weight up to `rows` rows.

        calls, chunks: see `Visual`; raised to what the samples require.
        """
        text = torch.tensor([-1])
        positions = self.renderer.rows and self.renderer.rows(text, ())
        filler = torch.tensor([self.filler]), torch.tensor([IGNORE]), torch.zeros(1)
        empty = Rendered(*filler, text, (), positions=positions)
        if self.renderer.decoder_start is not None:  # one position for the encoder and one for the decoder
            twice = (torch.cat([each] * 2) for each in (*filler, text))
            empty = Rendered(*twice, (), encoded=1)
        tokens = [sample.tokens for sample in samples]
        tokens += [empty] * (max(rows, 1) - len(samples))
        pad = partial(pad_sequence, batch_first=True)
        return self._batch(
            samples,
            (calls, chunks),
            pad(_counted_on(tokens), padding_value=-1),
            input_ids=pad([t.input_ids for t in tokens], padding_value=self.filler),
            targets=pad([t.targets for t in tokens], padding_value=IGNORE),
            weights=pad([t.weights for t in tokens]),
            lengths=torch.tensor([len(t) for t in tokens]),
            positions=None if positions is None else pad([t.positions.T for t in tokens]).permute(2, 0, 1),
            **self._rules(tokens, partial(pad, padding_value=-1)),
            **self._decoder(tokens),
        )

    def pack(self, samples: list[Sample], calls: int = 1, chunks: int = 1) -> Batch:
        """Concatenate samples in a single row; without samples, a row of one position with zero weight."""
        if not samples:
            return self.collate([], rows=1, calls=calls, chunks=chunks)
        tokens = [sample.tokens for sample in samples]
        lengths = torch.tensor([len(t) for t in tokens])
        ends = lengths.cumsum(0)
        batch = self._batch(
            samples,
            (calls, chunks),
            torch.cat(_counted_on(tokens))[None],
            input_ids=torch.cat([t.input_ids for t in tokens])[None],
            targets=torch.cat([t.targets for t in tokens])[None],
            weights=torch.cat([t.weights for t in tokens])[None],
            lengths=ends[-1:],
            boundaries=F.pad(ends, (1, 0)).int(),
            **self._rules(tokens, lambda parts: torch.cat(parts)[None]),
        )
        if self.positions is None:
            positions = torch.cat([t.places for t in tokens])[None]
        else:
            positions = torch.cat([t.positions for t in tokens], dim=1)[:, None]
        batch = batch._replace(positions=positions, segments=lengths)
        if all(t.branch is None for t in tokens):
            return batch
        branches = [torch.zeros(len(t), dtype=torch.long) if t.branch is None else t.branch for t in tokens]
        return batch._replace(branch=torch.cat(branches)[None])

    @property
    def rules(self) -> tuple[str, ...]:
        """The fields of batches, other than those of packing, that say which positions see each other."""
        return {"prefix": ("prefix",), "images": ("bidirectional",)}.get(self.attention, ())

    def _rules(self, tokens: Sequence[Rendered], joined: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
        """The fields of a batch that say which positions see each other in both directions.

        joined: makes the rows of a batch of the values at the positions of each sample.
        """
        if self.attention == "prefix":
            return {"prefix": torch.tensor([each.asked for each in tokens])}
        if self.attention == "images":
            are_visual = ((each.index >= 0) | torch.isin(each.input_ids, self._controls) for each in tokens)
            return {"bidirectional": joined([each.long() - 1 for each in are_visual])}
        return {}

    def _decoder(self, tokens: Sequence[Rendered]) -> dict[str, Decoder]:
        """The field of a padded batch that says which part of each row the decoder reads, if there is one."""
        if self.renderer.decoder_start is None:
            return {}
        starts = [each.encoded for each in tokens]
        longest = max(len(each) - start for each, start in zip(tokens, starts))
        return {"decoder": Decoder(torch.tensor(starts), max(starts), longest)}

    def _batch(self, samples: list[Sample], calls: tuple[int, int], index: Tensor, **tensors: Tensor | None) -> Batch:
        visual = None if self.geometry is None else self._visual(samples, *calls, index)
        if visual is not None and self.geometry.slot_token:
            visual = visual._replace(seen=Seen.of(index, tensors.get("boundaries")))
        targets, weights = tensors["targets"].flatten(), tensors["weights"].flatten()
        positions = (weights > 0).nonzero()[:, 0]
        counts = torch.tensor([int((sample.tokens.weights > 0).sum()) for sample in samples], dtype=torch.long)
        sources = torch.tensor([sample.source for sample in samples], dtype=torch.long).repeat_interleave(counts)
        trained = Targets(positions, targets[positions], weights[positions], sources)
        return Batch(**tensors, trained=trained, visual=visual, ids=tuple(sample.id for sample in samples))

    def _visual(self, samples: list[Sample], calls: int, chunks: int, index: Tensor) -> Visual:
        """What the samples show; `index` counts the placements of all of them."""
        items, placements = media = joined([sample.tokens.media for sample in samples])
        slots = sum(placement.slots for placement in placements)
        assert int((index >= 0).sum()) == slots, f"{int((index >= 0).sum())} image positions, but {slots} slots"
        texts = [text for sample in samples for text in sample.texts]
        if not items:
            texts = [self.reader.encode("")] if self.reader else []
        native, smallest = self.geometry.fit == "native", self.geometry.sizes(self.geometry.smallest)
        pixels, cached = [], []
        for encoder, (look, size) in enumerate(zip(self.geometry.mean_std, smallest)):
            images = [image for sample in samples for image in sample.pixels[encoder]]
            if any(image.is_floating_point() for image in images):
                images = normalized(tuple(images), *look)
            if not items:
                images = [torch.zeros(3, *size)]
            if not native:
                images = torch.stack(_same_frames(images)) if images else torch.zeros(0, 3, *size, dtype=torch.uint8)
            pixels.append(tuple(images) if native else images)
            found = [item for sample in samples if sample.cached for item in sample.cached[encoder]]
            cached.append(_cached(found, native))
        return Visual(
            tuple(pixels),
            items,
            placements,
            index,
            Texts(*pad_texts(texts)) if self.reader else None,
            tuple(cached) if any(cached) else (),
            max(calls, len(media.sizes)),
            self.geometry.mean_std,
            frames=self.geometry.separate_frames,
            chunks=max(chunks, self.chunks(len(items))),
        )

    @property
    def _settings(self) -> dict:
        """What a model folder stores of a processor, beside its tokenizers."""
        return {
            "template": self.renderer.template,
            "fallback": self.fallback,
            "max_length": self.max_length,
            "geometry": self.geometry and _described(self.geometry),
            "reader": self.reader and {"reads": self.reader.reads, "max_length": self.reader.max_length},
            "positions": self.positions,
            **({"boxes": asdict(self.boxes)} if self.boxes else {}),
            **({"actions": asdict(self.actions)} if self.actions else {}),
            **({"attention": self.attention} if self.attention != CAUSAL else {}),
            **({"decoder_start": self.renderer.decoder_start} if self.renderer.decoder_start is not None else {}),
        }

    @property
    def rendering_identity(self) -> str:
        """Equal only for processors that render conversations to the same tokens."""
        tokenizer = self.tokenizer
        vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        # the texts of a template may change from day to day, if it contains the date
        words = tokenizer.special_tokens_map, tokenizer.chat_template, self.renderer.sample_texts
        return repr((RENDERING, vocabulary, words, self.in_pairs, self._settings))

    def save_pretrained(self, folder: str | Path) -> None:
        """Save tokenizer and settings in ``folder/processor``."""
        folder = Path(folder) / "processor"
        self.tokenizer.save_pretrained(folder)
        if self.reader and self.reader.tokenizer is not self.tokenizer:
            self.reader.tokenizer.save_pretrained(folder / OWN_TOKENIZER)
        (folder / "processor.json").write_text(json.dumps(self._settings, indent=2) + "\n")

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
            boxes, actions = (settings.pop(name, None) for name in ("boxes", "actions"))
            if type(settings.get("max_length")) is not int:
                raise ValueError(f"max_length={settings.get('max_length')}: expected an integer")
            geometry = saved and Geometry(**{key: as_tuple(value) for key, value in saved.items()})
            if reader:
                own = folder / OWN_TOKENIZER
                reader = TextReader(_saved_tokenizer(own) if own.exists() else tokenizer, **reader)
            written = {"boxes": boxes and Writing(**boxes), "actions": actions and Binning.of(actions)}
            return cls(tokenizer, geometry, **settings, reader=reader, **written)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is not a saved processor: {first_line(error)}") from None


def _described(geometry: Geometry) -> dict:
    """The fields of a geometry; those that model folders of earlier versions lack, only if they are used."""
    added = ("others", "video", "tile_margin", "slot_token", "newline", "frame_shared")
    return {key: value for key, value in asdict(geometry).items() if key not in added or value}


def _saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder / 'tokenizer.json'} is missing: the model folder has no tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot read
        raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {first_line(error)}") from None


def _same_frames(images: Sequence[Tensor]) -> list[Tensor]:
    """Images ``(3, H, W)`` among clips ``(T, 3, H, W)`` as clips of equal frames."""
    frames = max((len(image) for image in images if image.ndim == 4), default=0)
    return [image.expand(frames, -1, -1, -1) if frames and image.ndim == 3 else image for image in images]


def _counted_on(samples: Sequence[Rendered]) -> list[Tensor]:
    """The placement at each position of each sample, counted over all samples."""
    found, before = [], 0
    for tokens in samples:
        found.append(torch.where(tokens.index >= 0, tokens.index + before, -1))
        before += len(tokens.media.placements)
    return found


def _cached(items: Sequence[ItemFeatures], native: bool) -> Cached | None:
    if not items:
        return None
    found = {number: item.features for number, item in enumerate(items) if item.features is not None}
    features = (packed if native else stacked)(list(found.values())) if found else None
    return Cached(tuple(item.key for item in items), tuple(found), features)


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
