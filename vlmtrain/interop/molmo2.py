"""Export to Hugging Face's Molmo2, and its comparison with a model: prompts, pixels, logits and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2TextConfig,
    Molmo2VideoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipVisionModel,
)
from transformers.video_utils import VideoMetadata

from ..batch import Batch
from ..connectors.pooling import SwiGLU
from ..connectors.published import published_state
from ..data.geometry import Geometry
from ..data.images import BILINEAR, ImageInMemory
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, Turn, is_video
from ..data.tile_styles import MOLMO2_CROPS, MOLMO2_HEADING, MOLMO2_OVERVIEW
from ..data.video import FrameSequence
from ..data.video_plan import VideoPlan
from ..errors import first_line
from ..frames import Joining
from ..model import VLMWrapper
from ..model.vision.base import block_index
from .chat_template import Speech, typed_speech
from .fitting import DoesNotFit, filled, relative_difference, require, tolerance
from .llava import Exported, generation_settings, language_state
from .native_parity import QUESTION, check_answer
from .probes import noise
from .towers import as_hf_tower, renamed

NAME = Molmo2ForConditionalGeneration.__name__
IMAGE, VIDEO, PATCH, COLUMN = "<|image|>", "<|video|>", "<im_patch>", "<im_col>"
FRAMES = {True: ("<frame_start>", "<frame_end>"), False: MOLMO2_CROPS}
"""The tokens around frames, by ``use_frame_special_tokens``."""
WORDS = tuple(dict.fromkeys([PATCH, COLUMN, *MOLMO2_OVERVIEW, *MOLMO2_CROPS, *FRAMES[True], "<im_low>"]))
"""Tokens that the class's processor looks for, beside those that stand for images and videos."""
PLAN = VideoPlan(
    fps=2.0,
    frames=64,
    sampling="seconds",
    last=True,
    fit=BILINEAR,
    joining=Joining("window", 3),
    timestamps="frame",
    time_format=" {time:.1f} ",
)
"""How videos are shown in training (published code); transformers' processor never chooses the last frame."""
FROM_SIGLIP = (
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^(embeddings|encoder)\.", ""),
    (r"\.out_proj\.", ".o_proj."),
)
"""Names of tensors of transformers' SigLIP as those of Molmo2's tower."""


@torch.no_grad()
def as_molmo2(model: VLMWrapper, processor: Processor) -> Exported:
    """Convert to Molmo2ForConditionalGeneration.

    Unchanged tensors are shared. Raises DoesNotFit for parts that the class does not support.
    """
    connector = getattr(model.connector, "connector", model.connector)
    _check(model, processor, connector)
    layers = model.vision.levels[::-1] if connector.num_levels else [model.vision.layer]
    layers = [block_index(layer, model.vision.num_blocks) for layer in layers]
    speech = _speech(processor)
    ids = dict(zip(WORDS, speech.tokenizer.convert_tokens_to_ids(list(WORDS))))
    vision, tower = _tower(model, max(layers) + 1)
    text, language = _language_model(model, speech, ids)
    names = next(names for names in connector.PUBLISHED if names.prefix == "model.multi_modal_projector.")
    projector = published_state(connector, names)
    projector.pop("token_bias", None)
    config = Molmo2Config(
        vision_config=vision,
        adapter_config={
            "vision_feature_layer": layers,
            "hidden_size": model.vision.width,
            "num_attention_heads": connector.pool.num_heads,
            "num_key_value_heads": connector.pool.num_heads,
            "head_dim": connector.pool.head_dim,
            "intermediate_size": connector.head.gate.out_features,
            "text_hidden_size": connector.out_dim,
        },
        text_config=text,
        image_patch_id=ids[PATCH],
        low_res_image_start_token_id=ids[MOLMO2_OVERVIEW[0]],
        image_start_token_id=ids[MOLMO2_CROPS[0]],
        image_end_token_id=ids[MOLMO2_CROPS[1]],
        frame_start_token_id=ids[FRAMES[True][0]],
        frame_end_token_id=ids[FRAMES[True][1]],
    )
    state = {
        **{f"model.vision_tower.{name}": tensor for name, tensor in tower.items()},
        **{f"{names.prefix}{name}": tensor for name, tensor in projector.items()},
        **language,
    }
    exported = filled(Molmo2ForConditionalGeneration, config, state, next(model.llm.parameters()).dtype)
    exported.generation_config = generation_settings(processor, speech)
    never = {*speech.media_ids, ids[PATCH], ids[COLUMN], *suppressed(model)}
    exported.generation_config.suppress_tokens = sorted(never)
    remarks = _remarks(processor.geometry.video)
    return Exported(exported, _processor(processor.geometry, connector.window, speech), remarks)


def suppressed(model: VLMWrapper) -> list[int]:
    """The ids with which the language model never answers."""
    return model.llm.generation_config.suppress_tokens or []


def _check(model: VLMWrapper, processor: Processor, connector: nn.Module) -> None:
    geometry, llm = processor.geometry, model.llm.config
    require(
        NAME,
        ("fusion.attention", processor.attention, "images"),
        ("image_fit", geometry.fit, "tiles"),
        ("image_tile_style", geometry.tile_style, "molmo2"),
        ("image_tiles_alone", geometry.tiles_alone, False),
        ("connector", connector.config["name"], "attentional_pool"),
        ("the language model's model_type", llm.model_type, "qwen3"),
    )
    if not isinstance(connector.head, SwiGLU):
        raise DoesNotFit(f"connector.head=linear: {NAME} requires swiglu")
    if any(geometry.frame):
        raise DoesNotFit(f"llm.image_frame={list(geometry.frame)}: {NAME} has other tokens around images")
    if sorted(geometry.tile_grids) != tile_grids(_most_crops(geometry)):
        raise DoesNotFit(f"image_tiles: {NAME} requires all grids of at most N crops, with one N")
    rope = llm.rope_parameters["rope_type"]
    if llm.attention_bias or rope != "default" or set(llm.layer_types) != {"full_attention"}:
        raise DoesNotFit(
            f"the language model has attention_bias={llm.attention_bias}, rope_type={rope} and layers "
            f"{', '.join(sorted(set(llm.layer_types)))}: {NAME} requires false, default and full_attention"
        )


def tile_grids(most: int) -> list[tuple[int, int]]:
    """All grids ``(rows, columns)`` of at most `most` crops."""
    sides = range(1, most + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= most]


def _most_crops(geometry: Geometry) -> int:
    return max(rows * columns for rows, columns in geometry.tile_grids)


def _tower(model: VLMWrapper, depth: int) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and tensors of the encoder's first `depth` blocks."""
    tower, _ = as_hf_tower(model.vision)
    if not isinstance(tower, SiglipVisionModel):
        raise DoesNotFit(f"{NAME} requires SigLIP's architecture, got {type(tower).__name__}")
    config, heads = tower.config, tower.config.num_attention_heads
    state = renamed(dict(tower.state_dict()), FROM_SIGLIP)
    unused = {f"layers.{number}" for number in range(depth, config.num_hidden_layers)} | {"post_layernorm", "head"}
    state = {
        name: tensor
        for name, tensor in state.items()
        if not unused & {name.partition(".")[0], ".".join(name.split(".")[:2])}
    }
    # the pixels of a patch: rows, columns, channels
    state["patch_embedding.weight"] = state["patch_embedding.weight"].permute(0, 2, 3, 1).flatten(1)
    values = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": config.hidden_size // heads,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": list(model.vision.image_size),
        "patch_size": model.vision.patch_size[0],
        "attention_dropout": config.attention_dropout,
    }
    return values, state


def _language_model(model: VLMWrapper, speech: Speech, ids: dict[str, int]) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and tensors of the language model, whose embeddings have rows for all tokens.

    Those of the tokens at whose positions the class adds tokens of images and newlines are the connector's.
    """
    config, state = language_state(model.llm, len(speech.tokenizer) - 1)
    head, name = model.llm.get_output_embeddings().weight, "model.language_model.embed_tokens.weight"
    table = state[name].clone()
    bias = getattr(model.connector, "connector", model.connector).token_bias
    table[ids[PATCH]] = 0 if bias is None else bias
    table[ids[COLUMN]] = model.connector.newline
    values = {key: value for key, value in config.to_dict().items() if key in Molmo2TextConfig.__annotations__}
    values |= {"vocab_size": len(head), "additional_vocab_size": len(table) - len(head), "tie_word_embeddings": False}
    return values, {**state, name: table, "lm_head.weight": head}


def _speech(processor: Processor) -> Speech:
    """The tokenizer, with the tokens that the class's processor looks for, and the chat template."""
    speech = typed_speech(processor, IMAGE, VIDEO, heading=MOLMO2_HEADING)
    tokenizer, known = speech.tokenizer, speech.tokenizer.get_vocab()
    new = [AddedToken(word, special=True, normalized=False) for word in WORDS if word not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    texts = [_prompt(tokenizer, kinds) for kinds in ((), ("image",))]
    start = bos_of(tokenizer)
    if not (start and all(text.startswith(start) for text in texts)):
        # the class's processor puts this token before all prompts that do not start with it
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(tokenizer(texts[0]).input_ids[0])
    return speech


def bos_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token with which the class's processor begins all prompts."""
    return tokenizer.bos_token or tokenizer.eos_token


def _prompt(speaker: ProcessorMixin | PreTrainedTokenizerBase, kinds: Sequence[str]) -> str:
    """The text of a question about media of some kinds."""
    items = [{"type": kind} for kind in kinds] + [{"type": "text", "text": QUESTION}]
    return speaker.apply_chat_template([{"role": "user", "content": items}], add_generation_prompt=True, tokenize=False)


def _processor(geometry: Geometry, window: int, speech: Speech) -> Molmo2Processor:
    height, width = geometry.size
    plan = PLAN if video_difference(geometry.video) else geometry.video
    look = {"image_mean": list(geometry.mean), "image_std": list(geometry.std)}
    look |= {"size": {"height": height, "width": width}, "patch_size": geometry.patch_size[0]}
    margins = [geometry.tile_margin] * 2
    images = Molmo2ImageProcessor(
        **look, max_crops=_most_crops(geometry), overlap_margins=margins, pooling_size=[window] * 2
    )
    videos = Molmo2VideoProcessor(
        **look,
        do_rescale=True,
        do_normalize=True,
        pooling_size=[plan.joining.stride] * 2,
        num_frames=plan.frames,
        max_fps=plan.fps,
    )
    return Molmo2Processor(
        images,
        videos,
        speech.tokenizer,
        chat_template=speech.template,
        use_single_crop_col_tokens=False,
        use_frame_special_tokens=plan.frame_tokens != FRAMES[False],
    )


def video_difference(plan: VideoPlan | None) -> str | None:
    """The first setting with which a plan shows frames differently from the class, or None."""
    if plan is None:
        return "no settings for videos"
    joining = plan.joining._replace(stride=PLAN.joining.stride)
    for name, got, expected in (
        ("fit", plan.fit, (PLAN.fit,)),
        ("pool", joining, (PLAN.joining,)),
        ("timestamps", plan.timestamps, (PLAN.timestamps,)),
        ("time_format", plan.time_format, (PLAN.time_format,)),
        ("frame_tokens", plan.frame_tokens, tuple(FRAMES.values())),
    ):
        if got not in expected:
            return f"another video.{name}"
    return None


def _remarks(plan: VideoPlan | None) -> tuple[str, ...]:
    difference = video_difference(plan)
    if difference:
        return (f"videos: the class shows them as molmo2 does, unlike training, which has {difference}",)
    remarks = []
    if plan.sampling != "seconds" or plan.last:
        rule = f"video.sampling={plan.sampling}" + (" with the last frame" if plan.last else "")
        remarks.append(
            f"videos: transformers chooses other frames than {rule}; give it the frames, with do_sample_frames=False"
        )
    if plan.token_budget is not None:
        remarks.append(f"videos: the class does not limit them to video.token_budget={plan.token_budget} tokens")
    return tuple(remarks)


# comparison


class Asked(NamedTuple):
    """A question as inputs of both. ids ``(1, T)``: of ours, with the class's tokens at the positions of media."""

    batch: Batch
    inputs: BatchFeature
    ids: Tensor

    @property
    def difference(self) -> str | None:
        """How the prompt differs from that of the class's processor, or None."""
        found, expected = self.inputs["input_ids"], self.ids
        if found.equal(expected) and self.inputs["mm_token_type_ids"].equal(self.batch.bidirectional + 1):
            return None
        both = zip(found[0].tolist(), expected[0].tolist())
        start = next((place for place, (one, other) in enumerate(both) if one != other), len(expected[0]))
        got, wanted = (ids[0, start:][:10].tolist() for ids in (found, expected))
        return f"from token {start} on, got ids {got}, expected {wanted}"


@torch.no_grad()
def compare_molmo2(exported: Exported, model: VLMWrapper, processor: Processor) -> float:
    """See `compare_outputs`. Raises DoesNotFit also if the class's processor makes other prompts."""
    if difference := prompt_difference(exported, model, processor):
        raise DoesNotFit(f"{NAME}'s processor makes other prompts: {difference}")
    return compare_outputs(exported, model, processor)


def prompt_difference(exported: Exported, model: VLMWrapper, processor: Processor) -> str | None:
    """The first difference between the prompts of `processor` and those of the class's processor, or None."""
    for media in _probes(processor):
        if difference := _asked(exported, model, processor, media).difference:
            return difference
    return None


@torch.no_grad()
def compare_outputs(exported: Exported, model: VLMWrapper, processor: Processor) -> float:
    """The largest difference of the logits for questions about two images, a video if videos are shown, and none.

    Both see the prompts of `processor`. Raises DoesNotFit if pixels or greedy answers differ, or if the logits differ
    by more than rounding.
    """
    dtype, worst = next(exported.model.parameters()).dtype, 0.0
    for media in _probes(processor):
        batch, inputs, ids = _asked(exported, model, processor, media)
        _check_pixels(batch, inputs, processor.geometry)
        batch = batch.to(torch.device("cpu"), dtype)
        inputs |= {
            "input_ids": ids,
            "mm_token_type_ids": batch.bidirectional + 1,
            "attention_mask": torch.ones_like(ids),
        }
        inputs = inputs.to(dtype=dtype)
        found = exported.model(**inputs, use_cache=False).logits
        difference = relative_difference(found, model(batch)[..., : found.shape[-1]])
        if not difference <= tolerance(dtype):
            raise DoesNotFit(
                f"{NAME} gives different logits with the same weights (by {difference:.1g} relative to the largest)"
            )
        worst = max(worst, difference)
        check_answer(NAME, exported, inputs, model, batch, suppressed(model))
    return worst


def _probes(processor: Processor) -> list[tuple[ImageInMemory | FrameSequence, ...]]:
    """Two images of noise that are cut into several crops, no media, and a video if the class shows it alike."""
    height, width = processor.geometry.size
    probes: list = [(noise((height + 1, 2 * width - 1)), noise((2 * height - 1, width + 1), seed=1)), ()]
    if not video_difference(processor.geometry.video):
        probes.append((FrameSequence(tuple(noise((height + 1, width - 1), seed) for seed in range(8)), 4.0),))
    return probes


def _asked(
    exported: Exported, model: VLMWrapper, processor: Processor, media: Sequence[ImageInMemory | FrameSequence]
) -> Asked:
    """A question about media. Raises DoesNotFit if the class's processor cannot prepare it."""
    kinds, given = ["video" if is_video(medium) else "image" for medium in media], {}
    if "image" in kinds:
        given["images"] = [[medium.load() for medium in media]]
    for video in media if "video" in kinds else ():
        plan = processor.geometry.video
        numbers = [number for clip in plan.clips(video.probe(), plan.frames) for number in clip.numbers]
        told = VideoMetadata(total_num_frames=len(video.images), fps=video.fps, frames_indices=numbers)
        frames = np.stack([np.asarray(video.images[number].load()) for number in numbers])
        given |= {"videos": [frames], "video_metadata": [told], "do_sample_frames": False}
    try:
        text = _prompt(exported.processor, kinds)
        inputs = exported.processor(text=[text], **given, return_tensors="pt")
    except Exception as error:  # processors of transformers raise anything for settings that do not fit
        what = f"{kinds[0]}s" if kinds else "no image"
        raise DoesNotFit(f"{NAME}'s processor cannot prepare a question about {what}: {first_line(error)}") from None
    for separator in ("", "\n"):  # which the template puts between an image and what follows
        question = Turn("user", f"{IMAGE_MARK}{separator}" * len(media) + QUESTION)
        batch = processor.collate([processor.prompt(Conversation("probe", (question,), tuple(media)))])
        asked = Asked(batch, inputs, _ids(batch, model, exported.processor.tokenizer))
        if asked.difference is None:
            break
    return asked


def _ids(batch: Batch, model: VLMWrapper, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids of a batch of one row with the class's tokens at the positions of images, newlines and frames."""
    patch, column = tokenizer.convert_tokens_to_ids([PATCH, COLUMN])
    ids = batch.input_ids.clone()
    for number, placement in enumerate(batch.visual.placements):
        tokens = torch.full((placement.slots,), patch)
        if placement.tiles is not None:
            _, width = model.connector.output_grid(*placement.tiles.patches(model.vision.grid))
            tokens[width :: width + 1] = column
        ids[batch.visual.index == number] = tokens
    return ids


def _check_pixels(batch: Batch, inputs: BatchFeature, geometry: Geometry) -> None:
    """Raise DoesNotFit unless the class's processor makes the same pixels of the items of a batch."""
    if not batch.visual.items:
        return
    key = "pixel_values_videos" if batch.visual.items[0].kind == "clip" else "pixel_values"
    (patch, _), expected = geometry.patch_size, batch.visual.normalized().pixels[0]
    expected = pixel_patches(expected.flatten(0, -4), patch)
    found = inputs[key]
    if found.shape != expected.shape:
        raise DoesNotFit(f"{NAME}'s processor makes {key} of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    spread = torch.tensor(geometry.std).repeat(patch * patch)
    levels = float(((found - expected).abs() * spread).max() * 255)
    if not levels <= 1.5:
        raise DoesNotFit(f"{NAME}'s processor makes other {key}, by {levels:.0f} of 255 levels")


def pixel_patches(images: Tensor, patch: int) -> Tensor:
    """The patches ``(N, h * w, p * p * 3)`` of images ``(N, 3, H, W)``, as the class's processor has them."""
    cut = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
