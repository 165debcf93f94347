"""Compares a model of native resolution with its class of transformers: prompts, pixels, logits and answers."""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from ..batch import Batch
from ..data.images import ImageInMemory
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, Turn
from ..errors import first_line
from ..model import VLMWrapper
from .fitting import DoesNotFit, relative_difference, tolerance
from .llava import Exported

QUESTION = "What is this?"
NEW = 8  # tokens of an answer


@torch.no_grad()
def compare_native(exported: Exported, model: VLMWrapper, processor: Processor) -> float:
    """The largest difference of the logits for questions about two images and about none.

    Raises DoesNotFit if prompts, pixels or greedy answers differ, or if the logits differ by more than rounding.
    """
    name, dtype = type(exported.model).__name__, next(exported.model.parameters()).dtype
    worst = 0.0
    for number in (2, 0):
        batch, inputs = _asked(exported, processor, _noise(processor, number))
        batch = batch.to(torch.device("cpu"), dtype)
        if number:
            _check_pixels(name, batch, inputs, model, processor)
        expected = model(batch)
        found = exported.model(**inputs.to(dtype=dtype), use_cache=False).logits[..., : expected.shape[-1]]
        difference = relative_difference(found, expected)
        if not difference <= tolerance(dtype):
            raise DoesNotFit(
                f"{name} gives different logits with the same weights (by {difference:.1g} relative to the largest)"
            )
        worst = max(worst, difference)
        _check_answer(name, exported, inputs, model, batch)
    return worst


def _noise(processor: Processor, number: int) -> list[Image.Image]:
    """Images of noise, the first wide and the second tall, which are not much larger than the smallest.

    Their sides are not multiples of patches, so that they are resized.
    """
    height, width = processor.geometry.smallest
    generator, images = torch.Generator().manual_seed(0), []
    for size in ((height + 1, 2 * width - 1), (2 * height - 1, width + 1))[:number]:
        pixels = torch.randint(0, 256, (*size, 3), generator=generator).to(torch.uint8)
        images.append(Image.fromarray(pixels.numpy()))
    return images


def _asked(exported: Exported, processor: Processor, images: list[Image.Image]) -> tuple[Batch, BatchFeature]:
    """A question about images as inputs of both. Raises DoesNotFit if the prompts differ."""
    items = [{"type": "image"}] * len(images) + [{"type": "text", "text": QUESTION}]
    name = type(exported.model).__name__
    try:
        text = exported.processor.apply_chat_template(
            [{"role": "user", "content": items}], add_generation_prompt=True, tokenize=False
        )
        inputs = exported.processor(text=[text], images=images or None, return_tensors="pt")
    except Exception as error:  # processors of transformers raise anything for settings that do not fit
        raise DoesNotFit(f"{name}'s processor cannot prepare a question about images: {first_line(error)}") from None
    found, image_id = inputs["input_ids"][0], exported.model.config.image_token_id
    for separator in ("", "\n"):  # which the template puts between an image and what follows
        question = Turn("user", f"{IMAGE_MARK}{separator}" * len(images) + QUESTION)
        conversation = Conversation("probe", (question,), tuple(map(_in_memory, images)))
        batch = processor.collate([processor.prompt(conversation)])
        expected = batch.input_ids[0].masked_fill(batch.visual.mask[0], image_id)
        if found.equal(expected):
            return batch, inputs
    counts = [int((ids == image_id).sum()) for ids in (found, expected)]
    if counts[0] != counts[1]:
        raise DoesNotFit(f"{name}'s processor makes {counts[0]} image tokens of the probe's images, not {counts[1]}")
    both = list(zip(found.tolist(), expected.tolist()))
    start = next((place for place, (one, other) in enumerate(both) if one != other), len(both))
    raise DoesNotFit(
        f"{name}'s processor makes other prompts: from token {start} on, got ids {found.tolist()[start:][:10]}, "
        f"expected {expected.tolist()[start:][:10]}"
    )


def _in_memory(image: Image.Image) -> ImageInMemory:
    encoded = BytesIO()
    image.save(encoded, "PNG")
    return ImageInMemory(encoded.getvalue(), "probe")


def _check_pixels(name: str, batch: Batch, inputs: BatchFeature, model: VLMWrapper, processor: Processor) -> None:
    (patch, _), order = model.vision.patch_size, model.vision.multiple
    rows = torch.cat([pixel_rows(image, patch, order) for image in batch.visual.normalized().pixels[0]])
    found = inputs["pixel_values"]
    frames = found.shape[1] // rows[0].numel() if len(found) == len(rows) else 0
    if not frames:
        raise DoesNotFit(f"{name}'s processor makes {len(found)} patches of the probe's images, expected {len(rows)}")
    found = found.view(len(rows), 3, frames, -1)
    spread = torch.tensor(processor.geometry.std)[:, None, None]
    levels = float(((found - rows.to(found.dtype).view(len(rows), 3, 1, -1)).abs() * spread).max() * 255)
    if not levels <= 1.5:
        raise DoesNotFit(f"{name}'s processor makes other pixels, by {levels:.0f} of 255 levels")


def pixel_rows(image: Tensor, patch: int, merge: int) -> Tensor:
    """The patches ``(N, 3, p, p)`` of an image ``(3, H, W)``: squares of `merge` x `merge`, each in raster order."""
    cut = image.unflatten(2, (-1, merge, patch)).unflatten(1, (-1, merge, patch))
    return cut.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)


def _check_answer(name: str, exported: Exported, inputs: BatchFeature, model: VLMWrapper, batch: Batch) -> None:
    """Raise DoesNotFit unless greedy answers are equal, or first differ where two tokens have nearly equal logits."""
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [exported.model.config.image_token_id]}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    found = exported.model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    theirs, ours = found.sequences[0, inputs["input_ids"].shape[1] :], model.generate(batch, **options)[0]
    if theirs.equal(ours):
        return
    step = int((theirs != ours).nonzero()[0])
    logits = found.logits[step][0]
    gap = (logits[theirs[step]] - logits[ours[step]]) / logits.abs().max()
    if not gap <= tolerance(logits.dtype):
        raise DoesNotFit(f"{name} answers with other tokens: got {theirs.tolist()}, expected {ours.tolist()}")
