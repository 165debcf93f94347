"""vlmtrain models under transformers' Auto classes, after ``import vlmtrain``: all connectors, encoders and fits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchFeature,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import ModelOutput

from ..data.connector_text import TextReader, pad_texts
from ..data.geometry import Geometry
from ..data.images import ImageInMemory, ImageOnDisk, show_items, to_rgb
from ..data.positions import POSITIONS
from ..data.processor import OWN_TOKENIZER, Processor, as_tuple
from ..data.records import IMAGE_MARK, Conversation, Turn
from ..data.rendered import IGNORE
from ..data.tile_styles import LLAVA_NEXT
from ..model import VLMWrapper
from ..model.deep_levels import at_prefill
from ..model.experts import restore_experts
from ..model.fusion import Concatenation, Fused, build_fusion
from ..model.parts import connector_from
from ..model.rotary import positions_of, restore_multimodal_rotary, rows_of_positions
from ..model.vision import describe_vision, vision_from
from ..tiling import Tiles, tiled_tokens
from ..visual import WHOLE, Item, Pixels, Placement, Texts, Visual, joined, normalized
from .chat_template import typed_speech
from .fitting import DoesNotFit
from .llava import Exported, generation_settings
from .own_config import VLMTrainConfig


class VLMTrainForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A `VLMWrapper` with the interface of transformers models."""

    config_class = VLMTrainConfig
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: VLMTrainConfig, parts: VLMWrapper | None = None):
        super().__init__(config)
        if parts is None:
            with torch.device("cpu"):  # buffers that are not saved must not be on the meta device
                parts = _build(config)
        self.vlm = parts
        tied = parts.llm._tied_weights_keys or {}
        self._tied_weights_keys = {f"vlm.llm.{name}": f"vlm.llm.{source}" for name, source in tied.items()}
        self._unsaved = {name: buffer.clone() for name, buffer in self.named_non_persistent_buffers()}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the parts have already been initialized."""

    @classmethod
    def from_pretrained(cls, *arguments, **options):
        found = super().from_pretrained(*arguments, **options)
        model = found[0] if isinstance(found, tuple) else found
        for name, value in model._unsaved.items():  # loading empties tensors that are in no file
            model.get_buffer(name).copy_(value)
        return found

    def get_input_embeddings(self):
        return self.vlm.llm.get_input_embeddings()

    def get_output_embeddings(self):
        return self.vlm.llm.get_output_embeddings()

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        more_pixel_values: Sequence[Tensor] = (),
        image_cuts: Tensor | None = None,
        image_sizes: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> tuple[Fused, Visual | None]:
        """Map ids ``(B, T)`` and items ``(N, 3, H, W)`` to the language model's input and the `Visual` of the images.

        image_cuts ``(P, 5)``: how each image is cut into tiles, as the fields of `Tiles`. image_sizes ``(N, 2)``:
        height and width of each item, if they differ; the rest of its pixels is padding. more_pixel_values: the items
        for each encoder but the first. text_ids, text_mask ``(N, L)``: text for each item, if the connector reads text.
        """
        is_image = input_ids == self.config.image_token_id
        ids = input_ids.masked_fill(is_image, 0)
        if not is_image.any():
            return Fused(self.get_input_embeddings()(ids)), None
        if pixel_values is None:
            raise ValueError(f"the text has {IMAGE_MARK} tokens, but pixel_values is missing: pass images")
        encoders, dtype = list(self.vlm.vision.encoders.values()), next(self.vlm.parameters()).dtype
        given = [pixels.to(dtype) for pixels in (pixel_values, *more_pixel_values)]
        if len(given) != len(encoders):
            raise ValueError(f"the model has {len(encoders)} encoders, but the inputs have pixels for {len(given)}")
        pixels: list[Pixels] = given
        if image_sizes is not None:
            grids = [encoders[0].grid_of(size) for size in image_sizes.tolist()]
            pixels = [
                tuple(
                    item[:, : h * encoder.patch_size[0], : w * encoder.patch_size[1]]
                    for item, (h, w) in zip(own, grids)
                )
                for own, encoder in zip(given, encoders)
            ]
        visual = self._visual(is_image, pixels, None if image_cuts is None else image_cuts.tolist())
        if text_ids is not None:
            visual = visual._replace(texts=Texts(text_ids, text_mask.bool()))
        return self.vlm.embed(ids, visual), visual

    def _rows(self, mask: Tensor, visual: Visual | None) -> Tensor | None:
        """Rows of positions ``(R, B, T)`` of inputs with an attention mask ``(B, T)``, if the language model reads any.

        They count from each row's first real position, as in training.
        """
        name = positions_of(self.vlm.llm)
        if name is None:
            return None
        rows = []
        for number, real in enumerate(mask.bool().cpu()):
            index = torch.full((int(real.sum()),), -1)
            placements: list[Placement] = []
            if visual is not None:
                index = visual.index[number].cpu()[real]
                shown = index[index >= 0].unique().tolist()
                placements = [visual.placements[each]._replace(medium=i) for i, each in enumerate(shown)]
                index = torch.where(index >= 0, index - min(shown, default=0), -1)
            positions = POSITIONS[name](index, placements)
            row = torch.zeros(len(positions), len(real), dtype=torch.long)
            row[:, real] = positions
            rows.append(row)
        return torch.stack(rows, dim=1).to(mask.device)

    def _visual(self, is_image: Tensor, pixels: Sequence[Pixels], cuts: list[list[int]] | None) -> Visual:
        """What the model's inputs show, as the batches of `vlmtrain.data.Processor` say it."""
        connector, items, placements = self.vlm.connector, [], []
        tiles = [None] * len(pixels[0]) if cuts is None else [Tiles(*cut) for cut in cuts]
        for medium, cut in enumerate(tiles):
            numbers = range(len(items), len(items) + (cut.views if cut else 1))
            for image in pixels[0][numbers.start : numbers.stop]:
                size = tuple(image.shape[1:])
                items.append(Item(medium, "image", ("squash",), WHOLE, (), (size,), (self.vlm.vision.grid_of(size),)))
            counts = (connector.num_tokens, connector.output_grid, connector.framed_grid)
            tokens, grid, framed = (count(*items[-1].grids[0]) for count in counts)
            if cut:
                tokens, grid, framed = tiled_tokens(cut, tokens, grid), None, None
            placements.append(Placement(medium, tuple(numbers), tokens, tokens, grid, cut, framed))
        owner = [number for number, placement in enumerate(placements) for _ in range(placement.slots)]
        if len(owner) != int(is_image.sum()):
            raise ValueError(f"the text has {int(is_image.sum())} image tokens, but the images have {len(owner)}")
        index = torch.full(is_image.shape, -1, device=is_image.device)
        index[is_image] = torch.tensor(owner, device=is_image.device)
        return Visual(tuple(pixels), tuple(items), tuple(placements), index)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        more_pixel_values: Sequence[Tensor] = (),
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_cuts: Tensor | None = None,
        image_sizes: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options,
    ):
        """Return the language model's output; options (logits_to_keep, past_key_values, ...) are passed on to it.

        labels ``(B, T)``: targets; -100 and image tokens are ignored. Raises ValueError for a cache to be continued if
        the language model reads rows of positions: `generate` continues them.
        """
        context = nullcontext()
        if inputs_embeds is None:
            fused, visual = self.embed(
                input_ids, pixel_values, more_pixel_values, image_cuts, image_sizes, text_ids, text_mask
            )
            inputs_embeds = fused.embeddings
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if (rows := self._rows(mask, visual)) is not None:
                cache = options.get("past_key_values")
                if cache is not None and cache.get_seq_length():
                    raise ValueError("a model with rows of positions continues its cache only in generate")
                context = rows_of_positions(self.vlm.llm, rows, mask.sum(1))
            options |= fused.visual_options(self.vlm.llm)
        if labels is not None:
            options["labels"] = labels.masked_fill(labels == self.config.image_token_id, IGNORE)
        with context:
            return self.vlm.llm(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **options
            )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        more_pixel_values: Sequence[Tensor] = (),
        image_cuts: Tensor | None = None,
        image_sizes: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        generation_config=None,
        **options,
    ) -> Tensor | ModelOutput:
        """Generate from prompts that are padded on the left; returns prompts and new tokens, ``(B, T + new)``.

        With return_dict_in_generate they are the ``sequences`` of the output of the language model's `generate`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.vlm.llm.generation_config = self.generation_config
        if generation_config is not None:
            options["generation_config"] = generation_config
        fused, visual = self.embed(
            input_ids, pixel_values, more_pixel_values, image_cuts, image_sizes, text_ids, text_mask
        )
        rows = self._rows(attention_mask, visual)
        with (
            rows_of_positions(self.vlm.llm, rows, attention_mask.sum(1)),
            at_prefill(self.vlm.llm, len(input_ids), **fused.visual_options(self.vlm.llm)),
        ):
            found = self.vlm.llm.generate(inputs_embeds=fused.embeddings, attention_mask=attention_mask, **options)
        new = found if isinstance(found, Tensor) else found.sequences
        whole = torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], dim=1)
        if isinstance(found, Tensor):
            return whole
        found.sequences = whole
        return found


def _build(config: VLMTrainConfig) -> VLMWrapper:
    llm = AutoModelForCausalLM.from_config(config.text_config)
    restore_multimodal_rotary(llm)
    restore_experts(llm)
    fusion = build_fusion(**config.fusion) if config.fusion else None
    return VLMWrapper(vision_from(config.vision), connector_from(config.connector), llm, fusion)


class VLMTrainProcessor(ProcessorMixin):
    """Prepares text with image tokens, and images as in training, for `VLMTrainForConditionalGeneration`.

    geometry: the fields of `Geometry`. reader: ``reads`` and ``max_length`` of a `TextReader`. reads_with: the
    tokenizer of that reader, if it is not the language model's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        geometry: dict | None = None,
        reader: dict | None = None,
        **unused,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.geometry, self.reader = geometry, reader
        self.image_token = IMAGE_MARK
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        self.reads_with: PreTrainedTokenizerBase = tokenizer

    def __call__(
        self,
        images: object = None,
        text: str | Sequence[str] | None = None,
        instructions: Sequence[str] | None = None,
        videos: object = None,
        padding: bool = True,
        return_tensors: str = "pt",
        **options,
    ) -> BatchFeature:
        """Prepare texts whose image tokens stand for `images` (PIL images or paths of files), in their order.

        instructions: for a connector that reads text, the user's text about each image. Raises ValueError if the
        numbers of image tokens, images and instructions do not match, or for videos.
        """
        if videos is not None:
            raise ValueError("an exported model accepts images, not videos: use its model folder with vlmtrain chat")
        geometry = Geometry(**{key: as_tuple(value) for key, value in self.geometry.items()})
        geometry = replace(geometry, frame=("", ""))  # a frame is in the text already; newlines are not
        loaded = [_opened(image) for image in _flat(images)]
        texts = [text] if isinstance(text, str) else list(text or ())
        marks = sum(one.count(self.image_token) for one in texts)
        if marks != len(loaded):
            raise ValueError(f"{marks} {self.image_token} tokens in the text, but {len(loaded)} images")
        of_text = iter(loaded)  # as in training, the images of one text are planned together
        groups = [[next(of_text) for _ in range(one.count(self.image_token))] for one in texts]
        media = joined([geometry.plan([(image.height, image.width) for image in images]) for images in groups])
        looks = geometry.mean_std
        pixels: list[list[Tensor]] = [[] for _ in looks]
        for medium, image in enumerate(loaded):
            shown = [item for item in media.items if item.medium == medium]
            for encoder, (mean, _) in enumerate(looks):
                pixels[encoder] += show_items(image, shown, mean, encoder)
        images_shown = iter(media.by_medium)
        expanded = []
        for one in texts:
            first, *rest = one.split(self.image_token)
            written = (self._written(next(images_shown), geometry.newline) + piece for piece in rest)
            expanded.append(first + "".join(written))
        options.pop("add_special_tokens", None)
        found = self.tokenizer(expanded, padding=padding, return_tensors=return_tensors, **options)
        data = {"input_ids": found.input_ids, "attention_mask": found.attention_mask}
        if loaded:
            if geometry.fit == "native":
                data["image_sizes"] = torch.tensor([item.pixels[0] for item in media.items])
            first, *more = (_padded(normalized(tuple(images), *look)) for images, look in zip(pixels, looks))
            data["pixel_values"] = first
            if more:
                data["more_pixel_values"] = more
            if cuts := [placement.tiles for placement in media.placements if placement.tiles]:
                data["image_cuts"] = torch.tensor(cuts)
            if self.reader:
                views = [sum(len(placement.items) for _, placement in places) for places in media.by_medium]
                data |= self._read(instructions, views)
        return BatchFeature(data)

    def _written(self, places: list[tuple[int, Placement]], newline: str) -> str:
        """The text of one image: the words of its views, each before the view's image tokens, and newlines."""
        text = ""
        for _, placement in places:
            rows = placement.newlines or 1
            text += placement.before + (self.image_token * (placement.slots // rows) + newline) * rows
        return text

    def _read(self, instructions: Sequence[str] | None, views: list[int]) -> dict[str, Tensor]:
        if instructions is None or len(instructions) != len(views):
            raise ValueError(
                "the connector reads text: pass instructions=[...], the user's text about each of the "
                f"{len(views)} images"
            )
        reader = TextReader(self.reads_with, **self.reader)
        texts = [reader.encode(words) for words, count in zip(instructions, views) for _ in range(count)]
        ids, mask = pad_texts(texts)
        return {"text_ids": ids, "text_mask": mask}

    def save_pretrained(self, save_directory: str | Path, **options):
        done = super().save_pretrained(save_directory, **options)
        if self.reads_with is not self.tokenizer:
            self.reads_with.save_pretrained(Path(save_directory) / OWN_TOKENIZER)
        return done

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options):
        processor = super().from_pretrained(pretrained_model_name_or_path, **options)
        if (Path(pretrained_model_name_or_path) / OWN_TOKENIZER).exists():
            processor.reads_with = AutoTokenizer.from_pretrained(Path(pretrained_model_name_or_path) / OWN_TOKENIZER)
        return processor


def _padded(pixels: Sequence[Tensor]) -> Tensor:
    """Items ``(3, h, w)`` as one tensor ``(N, 3, H, W)``, with zeros to the right of and below smaller ones."""
    height, width = (max(image.shape[side] for image in pixels) for side in (1, 2))
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in pixels])


def _opened(image: object) -> Image.Image:
    """An image or image file as RGB, as in training. Raises ValueError for anything else."""
    if isinstance(image, str | Path):
        return ImageOnDisk(Path(image)).load()
    if not isinstance(image, Image.Image):
        raise ValueError(f"images: got a {type(image).__name__}, expected PIL images or paths of files")
    return to_rgb(image)


def _flat(images: object) -> list:
    if images is None:
        return []
    return [one for each in images for one in _flat(each)] if isinstance(images, list | tuple) else [images]


def as_own(model: VLMWrapper, processor: Processor) -> Exported:
    """Wrap the unchanged model for transformers' Auto classes.

    Raises DoesNotFit for a fusion whose visual tokens are not in the text, and for positions that count images if the
    views of an image have places of their own in the text.
    """
    geometry = processor.geometry
    if not model.fusion.in_text:
        raise DoesNotFit(f"fusion={model.fusion.config['name']}: exports need visual tokens that are in the text")
    if positions_of(model.llm) == "xdrope" and geometry.fit == "tiles" and geometry.tile_style != LLAVA_NEXT:
        raise DoesNotFit(
            f"image_tile_style={geometry.tile_style}: exports with llm.positions=xdrope would number the views of an "
            "image, not the images"
        )
    speech = typed_speech(processor)
    if geometry.newline:  # so that it is one token also between image tokens
        word = AddedToken(geometry.newline, special=True, normalized=False)
        speech.tokenizer.add_tokens([word], special_tokens=True)
    text_config = model.llm.config
    config = VLMTrainConfig(
        text_config=text_config,
        vision=describe_vision(model.vision),
        connector=dict(model.connector.config),
        fusion=None if type(model.fusion) is Concatenation else dict(model.fusion.config),
        image_token_id=speech.image_id,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    exported = VLMTrainForConditionalGeneration(config, model).eval()
    exported.generation_config = generation_settings(processor, speech)
    reader = processor.reader and {"reads": processor.reader.reads, "max_length": processor.reader.max_length}
    hf_processor = VLMTrainProcessor(speech.tokenizer, speech.template, asdict(processor.geometry), reader)
    if processor.reader and processor.reader.tokenizer is not processor.tokenizer:
        hf_processor.reads_with = processor.reader.tokenizer
    if processor.geometry.view_words or processor.geometry.newline:
        _check_words(hf_processor, processor)
    return Exported(exported, hf_processor, ())


def _check_words(exported: VLMTrainProcessor, processor: Processor) -> None:
    """Raise DoesNotFit unless the words between the views, or after the rows, of images give the ids of training."""
    height, width = processor.geometry.size
    images = [Image.new("RGB", size) for size in ((3 * width, 2 * height), (width, 3 * height), (width, height))]
    encoded = []
    for image in images:
        image.save(file := BytesIO(), "PNG")
        encoded.append(ImageInMemory(file.getvalue(), "probe"))
    for marks, count in ((f"{IMAGE_MARK}\n", 1), (f"Look: {IMAGE_MARK} and {IMAGE_MARK}\n{IMAGE_MARK}", 3)):
        said = f"{marks}What is this?"
        wanted = processor.prompt(Conversation("probe", (Turn("user", said),), tuple(encoded[:count]))).tokens
        text = exported.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)
        found = exported(images=images[:count], text=text)["input_ids"][0].tolist()
        if found != wanted.input_ids.masked_fill(wanted.index >= 0, exported.image_token_id).tolist():
            raise DoesNotFit(
                "the words between the views of an image, or after its rows, would be other tokens than in training"
            )
