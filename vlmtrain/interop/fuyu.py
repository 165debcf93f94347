"""Export to Hugging Face's Fuyu, and comparison with it: prompts, pixels and logits."""

from __future__ import annotations

import copy
import math

import torch
from transformers import BatchFeature, FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, FuyuProcessor

from ..batch import Batch
from ..data.geometry import Geometry
from ..data.images import ImageInMemory
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, Turn
from ..data.templates import FUYU
from ..errors import first_line
from ..model import VLMWrapper
from ..model.vision import PatchVision
from ..visual import Pixels
from .chat_template import Speech
from .fitting import DoesNotFit, filled, relative_difference, require, tolerance
from .llava import Exported, generation_settings, language_state
from .probes import noise

IMAGE, NEWLINE, START, ANSWER = "|SPEAKER|", "|NEWLINE|", "<s>", "<0x04>"
"""What Fuyu's processor writes: the token of a patch, the end of a row, the start of the text and of the answer."""
QUESTION = "What is this?"


@torch.no_grad()
def as_fuyu(model: VLMWrapper, processor: Processor) -> Exported:
    """Convert to FuyuForCausalLM. Unchanged tensors are shared.

    Raises DoesNotFit for parts that the class does not support.
    """
    geometry, connector = processor.geometry, model.connector
    _check(model, processor)
    tokenizer = copy.deepcopy(processor.tokenizer)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    text, language = language_state(model.llm, len(tokenizer) - 1)
    projection = {f"model.vision_embed_tokens.{name}": each for name, each in connector.layers[0].state_dict().items()}
    (patch, _), (height, width) = geometry.patch_size, geometry.size
    config = FuyuConfig(
        text_config=text.to_dict(),
        patch_size=patch,
        image_token_id=image_id,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    exported = filled(FuyuForCausalLM, config, {**language, **projection}, next(model.llm.parameters()).dtype)
    exported._weight_conversions = None  # so that it is saved under the published names, not those of `state`
    exported.generation_config = generation_settings(processor, Speech(tokenizer, image_id, ""))
    patches = {"height": patch, "width": patch}
    images = FuyuImageProcessor(patch_size=patches, size={"height": height, "width": width})
    remarks = (
        "images: transformers scales large ones down with torchvision, whose rounding differs by one gray level for "
        "some pixels",
        f"prompts: the class's processor puts one image before the text, and writes {ANSWER} only after such a text",
    )
    return Exported(exported, FuyuProcessor(images, tokenizer), remarks)


def _check(model: VLMWrapper, processor: Processor) -> None:
    geometry, vocabulary = processor.geometry, processor.tokenizer.get_vocab()
    if not isinstance(model.vision, PatchVision):
        raise DoesNotFit(f"vision={model.vision.provider}: Fuyu reads the pixels of patches (vision=patches)")
    least, most = geometry.image_pixels or (0, 0)
    patch, largest = math.prod(geometry.patch_size), math.prod(geometry.size)
    require(
        "Fuyu",
        ("connector", model.connector.config["name"], "linear"),
        ("image_fit", geometry.fit, "native"),
        ("llm.image_newline", geometry.newline or None, NEWLINE),
        ("llm.image_frame", list(geometry.frame), ["", ""]),
        ("template", processor.renderer.template, FUYU),
        ("bos_token", processor.tokenizer.bos_token, START),
        ("vision.patch_size", list(geometry.patch_size), [geometry.patch_size[1]] * 2),
    )
    if least > patch or most < largest:
        raise DoesNotFit(
            f"image_pixels=[{least}, {most}]: Fuyu limits only the sides of images; expected MIN up to {patch}, the "
            f"pixels of a patch, and MAX from {largest}, those of vision.image_size"
        )
    if lacking := [word for word in (IMAGE, ANSWER) if word not in vocabulary]:
        raise DoesNotFit(f"the tokenizer has no {lacking[0]}, which Fuyu's processor writes")


@torch.no_grad()
def compare_fuyu(exported: Exported, model: VLMWrapper, processor: Processor) -> float:
    """The largest difference of the logits for questions about images that are not of whole patches.

    Raises DoesNotFit if prompts or pixels differ, those also of a large image, or logits by more than rounding.
    """
    dtype, worst = next(exported.model.parameters()).dtype, 0.0
    for image in _images(processor.geometry):
        batch, inputs = _asked(exported, processor, image)
        expected = model(batch.to(torch.device("cpu"), dtype))
        found = exported.model(**inputs.to(dtype=dtype), use_cache=False).logits[..., : expected.shape[-1]]
        difference = relative_difference(found, expected)
        if not difference <= tolerance(dtype):
            raise DoesNotFit(
                f"FuyuForCausalLM gives different logits with the same weights (by {difference:.1g} relative to the "
                "largest)"
            )
        worst = max(worst, difference)
    height, width = processor.geometry.size
    _asked(exported, processor, noise((2 * height - 1, width + 1)))
    return worst


def _images(geometry: Geometry) -> list[ImageInMemory]:
    height, width = geometry.patch_size
    return [noise((height + 1, 3 * width - 1)), noise((2 * height - 1, width + 1), seed=1)]


def _asked(exported: Exported, processor: Processor, image: ImageInMemory) -> tuple[Batch, BatchFeature]:
    """A question about an image as inputs of both. Raises DoesNotFit if they differ."""
    question = Conversation("probe", (Turn("user", IMAGE_MARK + QUESTION),), (image,))
    batch = processor.collate([processor.prompt(question)])
    try:
        inputs = exported.processor(
            images=image.load(), text=QUESTION, return_legacy_image_output=False, return_tensors="pt"
        )
    except Exception as error:  # processors of transformers raise anything for settings that do not fit
        raise DoesNotFit(f"Fuyu's processor cannot prepare a question about an image: {first_line(error)}") from None
    inputs = BatchFeature({key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")})
    wanted = batch.input_ids.masked_fill(batch.visual.mask, exported.model.config.image_token_id)
    if not inputs["input_ids"].equal(wanted):
        tokens = (processor.tokenizer.convert_ids_to_tokens(ids[0].tolist()) for ids in (inputs["input_ids"], wanted))
        told = ", expected ".join(" ".join(each) for each in tokens)
        raise DoesNotFit(f"Fuyu's processor makes other prompts: got {told}")
    pixels, (spread, *_) = patch_rows(batch.visual.normalized().pixels[0], processor.geometry), processor.geometry.std
    levels = float((inputs["pixel_values"] - pixels).abs().max()) * spread * 255
    if not levels <= 1.5:
        raise DoesNotFit(f"Fuyu's processor makes other pixels, by {levels:.0f} of 255 levels")
    return batch, inputs


def patch_rows(images: Pixels, geometry: Geometry) -> torch.Tensor:
    """The values ``(N, 3 * p * p)`` of the patches of images, as Fuyu reads them."""
    return PatchVision(geometry.patch_size)(images).patches
