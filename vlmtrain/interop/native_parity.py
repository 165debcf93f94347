"""Compares a model of native resolution with its class of transformers: prompts, pixels, logits and answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

from ..batch import Batch
from ..data.geometry import Geometry
from ..data.images import ImageInMemory
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, Turn, VideoFacts, is_video
from ..data.video import FrameSequence
from ..errors import first_line
from ..model import VLMWrapper
from .fitting import DoesNotFit, relative_difference, tolerance
from .llava import Exported
from .native_families import FAMILIES
from .probes import noise

QUESTION = "What is this?"
NEW = 8  # tokens of an answer
# As short as Qwen's rules allow: after more pairs of frames than rows and columns of tokens, transformers lets the
# positions of the text overlap with those of the video (get_rope_index), unlike Qwen2-VL's paper and published code.
FRAMES, RATE = 4, 24.0
Media = Sequence[ImageInMemory | FrameSequence]


@torch.no_grad()
def compare_native(exported: Exported, model: VLMWrapper, processor: Processor) -> float:
    """The largest difference of the logits for questions about two images, a video beside an image, and none.

    The class is not asked about a video if it shows videos in another way. Raises DoesNotFit if prompts, pixels or
    greedy answers differ, or if the logits differ by more than rounding.
    """
    name, dtype = type(exported.model).__name__, next(exported.model.parameters()).dtype
    family, geometry = FAMILIES[exported.model.config.model_type], processor.geometry
    probes: list[Media] = [_images(geometry), ()]
    if family.video is not None and family.video_difference(geometry.video) is None:
        probes.append((_images(geometry)[1], _video(geometry)))
    worst = 0.0
    for media in probes:
        batch, inputs = _asked(exported, processor, media)
        batch = batch.to(torch.device("cpu"), dtype)
        if media:
            _check_pixels(name, batch, inputs, model, processor)
        expected = model(batch)
        found = exported.model(**inputs.to(dtype=dtype), use_cache=False).logits[..., : expected.shape[-1]]
        difference = relative_difference(found, expected)
        if not difference <= tolerance(dtype):
            raise DoesNotFit(
                f"{name} gives different logits with the same weights (by {difference:.1g} relative to the largest)"
            )
        worst = max(worst, difference)
        check_answer(name, exported, inputs, model, batch)
    return worst


def _images(geometry: Geometry) -> list[ImageInMemory]:
    """Images of noise, the first wide and the second tall, which are not much larger than the smallest.

    Their sides are not multiples of patches, so that they are resized.
    """
    height, width = geometry.smallest
    return [noise((height + 1, 2 * width - 1)), noise((2 * height - 1, width + 1), seed=1)]


def _video(geometry: Geometry) -> FrameSequence:
    """A video of noise of a size that is not changed: transformers resizes videos with torchvision, not with Pillow."""
    height, width = geometry.smallest
    facts = VideoFacts(np.arange(FRAMES) / RATE, FRAMES / RATE, (height + 1, 2 * width - 1))
    size = geometry.plan([facts]).items[0].pixels[0]
    return FrameSequence(tuple(noise(size, seed) for seed in range(FRAMES)), RATE)


def _asked(exported: Exported, processor: Processor, media: Media) -> tuple[Batch, BatchFeature]:
    """A question about media as inputs of both. Raises DoesNotFit if the prompts differ."""
    kinds = ["video" if is_video(medium) else "image" for medium in media]
    items = [{"type": kind} for kind in kinds] + [{"type": "text", "text": QUESTION}]
    name, config = type(exported.model).__name__, exported.model.config
    given: dict = {}
    if images := [medium.load() for medium in media if not is_video(medium)]:
        given["images"] = images
    if videos := [medium for medium in media if is_video(medium)]:
        frames = [np.stack([np.asarray(image.load()) for image in video.images]) for video in videos]
        told = [VideoMetadata(total_num_frames=len(video.images), fps=video.fps) for video in videos]
        plan = processor.geometry.video
        rate = {"fps": plan.fps} if plan.fps else {"num_frames": plan.frames}
        given |= {"videos": frames, "video_metadata": told, "do_sample_frames": True, **rate}
    try:
        text = exported.processor.apply_chat_template(
            [{"role": "user", "content": items}], add_generation_prompt=True, tokenize=False
        )
        inputs = exported.processor(text=[_unframed(text, exported, processor)], **given, return_tensors="pt")
    except Exception as error:  # processors of transformers raise anything for settings that do not fit
        what = "an image and a video" if videos else "images"
        raise DoesNotFit(f"{name}'s processor cannot prepare a question about {what}: {first_line(error)}") from None
    found, ids = inputs["input_ids"][0], {kind: getattr(config, f"{kind}_token_id") for kind in dict.fromkeys(kinds)}
    for separator in ("", "\n"):  # which the template puts between an image and what follows
        question = Turn("user", f"{IMAGE_MARK}{separator}" * len(media) + QUESTION)
        batch = processor.collate([processor.prompt(Conversation("probe", (question,), tuple(media)))])
        of_placement = [ids[kinds[placement.medium]] for placement in batch.visual.placements]
        index, expected = batch.visual.index[0], batch.input_ids[0]
        expected = torch.where(index < 0, expected, torch.tensor([*of_placement, 0])[index])
        if found.equal(expected):
            return batch, inputs
    for kind, token_id in ids.items():
        made, wanted = (int((each == token_id).sum()) for each in (found, expected))
        if made != wanted:
            raise DoesNotFit(f"{name}'s processor makes {made} {kind} tokens of the probe's {kind}s, not {wanted}")
    both = list(zip(found.tolist(), expected.tolist()))
    start = next((place for place, (one, other) in enumerate(both) if one != other), len(both))
    raise DoesNotFit(
        f"{name}'s processor makes other prompts: from token {start} on, got ids {found.tolist()[start:][:10]}, "
        f"expected {expected.tolist()[start:][:10]}"
    )


def _unframed(text: str, exported: Exported, processor: Processor) -> str:
    """The text without the tokens around a video if the class's processor writes them around each of its frames.

    transformers 5.23 keeps the template's tokens around all of them, unlike Qwen3-VL's published code.
    """
    if FAMILIES[exported.model.config.model_type].video is None:
        return text
    plan, (before, after), token = processor.geometry.video, processor.geometry.frame, exported.processor.video_token
    return text.replace(before + token + after, token) if plan and plan.timestamps == "frame" else text


def _check_pixels(name: str, batch: Batch, inputs: BatchFeature, model: VLMWrapper, processor: Processor) -> None:
    (patch, _), order = model.vision.patch_size, model.vision.multiple
    shown = zip(batch.visual.items, batch.visual.normalized().pixels[0])
    rows: dict[str, list[Tensor]] = {}
    for item, pixels in shown:
        key = "pixel_values_videos" if item.kind == "clip" else "pixel_values"
        frames = [pixel_rows(frame, patch, order) for frame in pixels.view(-1, *pixels.shape[-3:])]
        rows.setdefault(key, []).append(torch.stack(frames, dim=2).flatten(3))
    spread = torch.tensor(processor.geometry.std)[:, None, None]
    for key, each in rows.items():
        expected, found = torch.cat(each), inputs[key]
        what = "video" if key == "pixel_values_videos" else "images"
        frames = found.shape[1] // expected[0, :, 0].numel() if len(found) == len(expected) else 0
        if not frames:
            raise DoesNotFit(
                f"{name}'s processor makes {len(found)} patches of the probe's {what}, expected {len(expected)}"
            )
        found = found.view(len(expected), 3, frames, -1)
        levels = float(((found - expected.to(found.dtype)).abs() * spread).max() * 255)
        if not levels <= 1.5:
            raise DoesNotFit(
                f"{name}'s processor makes other pixels of the probe's {what}, by {levels:.0f} of 255 levels"
            )


def pixel_rows(image: Tensor, patch: int, merge: int) -> Tensor:
    """The patches ``(N, 3, p, p)`` of an image ``(3, H, W)``: squares of `merge` x `merge`, each in raster order."""
    cut = image.unflatten(2, (-1, merge, patch)).unflatten(1, (-1, merge, patch))
    return cut.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)


def check_answer(
    name: str,
    exported: Exported,
    inputs: BatchFeature,
    model: VLMWrapper,
    batch: Batch,
    suppressed: Sequence[int] = (),
) -> None:
    """Raise DoesNotFit unless greedy answers are equal, or first differ where two tokens have nearly equal logits.

    suppressed: ids that answers never contain, beside the token of images.
    """
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["suppress_tokens"] = [exported.model.config.image_token_id, *suppressed]
    found = exported.model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    theirs, ours = found.sequences[0, inputs["input_ids"].shape[1] :], model.generate(batch, **options)[0]
    if theirs.equal(ours):
        return
    step = int((theirs != ours).nonzero()[0])
    logits = found.logits[step][0]
    gap = (logits[theirs[step]] - logits[ours[step]]) / logits.abs().max()
    if not gap <= tolerance(logits.dtype):
        raise DoesNotFit(f"{name} answers with other tokens: got {theirs.tolist()}, expected {ours.tolist()}")
