"""Export to Hugging Face's classes of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and HunyuanOCR."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, ProcessorMixin

from ..connectors.published import published_state
from ..data.frame_sampling import QWEN_LEAST
from ..data.geometry import Geometry
from ..data.processor import Processor
from ..model import VLMWrapper
from ..model.rotary import KEY, positions_of
from ..model.vision import VisionEncoder
from ..model.vision.base import block_index
from ..model.vision.checkpoint import facts
from .chat_template import Speech, typed_speech
from .fitting import DoesNotFit, filled, require
from .llava import Exported, generation_settings, language_state
from .native_families import FAMILIES, Family


@torch.no_grad()
def as_native(model: VLMWrapper, processor: Processor) -> Exported:
    """Convert to the class whose tower, merger and language model these are.

    Unchanged tensors are shared. Raises DoesNotFit for parts that none of the classes supports.
    """
    kind = next((kind for kind, family in FAMILIES.items() if type(model.vision) is family.tower), None)
    if kind is None:
        raise DoesNotFit(f"no class of transformers has {type(model.vision).__name__} as its encoder")
    family = FAMILIES[kind]
    _check(model, processor.geometry, family)
    model_class = getattr(transformers, family.model_class)
    speech = _speech(processor, family)
    text, language = language_state(model.llm, len(speech.tokenizer) - 1)
    tower, published = f"model.{family.tower_name}.", _published(model.connector, family)
    state = {
        **{f"{tower}{name}": tensor for name, tensor in model.vision.state_dict().items()},
        **published,
        **language,
    }
    config = _config(model, processor, family, model_class.config_class, text, speech)
    exported = filled(model_class, config, state, next(model.llm.parameters()).dtype)
    exported._weight_conversions = None  # so that it is saved under the published names, not those of `state`
    exported.generation_config = generation_settings(processor, speech)
    remarks = [
        "images: transformers resizes them with torchvision, whose rounding differs by one gray level for some pixels; "
        "processor.image_processor = AutoImageProcessor.from_pretrained(OUT_DIR, backend='pil') resizes as in training"
    ]
    if family.video is not None:
        plan = processor.geometry.video
        if difference := family.video_difference(plan):
            remarks.append(f"videos: the class shows them as {kind} does, unlike training, which has {difference}")
        elif plan.token_budget is not None:
            remarks.append(f"videos: the class does not limit them to video.token_budget={plan.token_budget} tokens")
    return Exported(exported, _processor(model.vision, processor.geometry, family, speech), tuple(remarks))


def _check(model: VLMWrapper, geometry: Geometry, family: Family) -> None:
    name, vision, connector = family.model_class, model.vision, model.connector
    factor = vision.config.spatial_merge_size
    require(
        name,
        ("connector", connector.config["name"], family.connector),
        ("connector.factor", connector.config.get("factor", factor), factor),
        ("the language model's model_type", model.llm.config.model_type, family.llm),
        ("llm.positions", positions_of(model.llm), family.positions),
        ("image_fit", geometry.fit, "native"),
    )
    if block_index(vision.layer, vision.num_blocks) != vision.num_blocks - 1:
        raise DoesNotFit(f"vision.layer={vision.layer}: {name} reads the last layer, -1")
    if not all(geometry.frame):
        raise DoesNotFit(f"llm.image_frame: {name} requires a token before and one after each image")


def _published(connector: nn.Module, family: Family) -> dict:
    """The merger's tensors under their names in the class."""
    start = f"model.{family.tower_name}."
    names = next(names for names in connector.PUBLISHED if names.prefix.startswith(start))
    return {f"{names.prefix}{name}": tensor for name, tensor in published_state(connector, names).items()}


def _config(
    model: VLMWrapper,
    processor: Processor,
    family: Family,
    config_class: type[PreTrainedConfig],
    text: PreTrainedConfig,
    speech: Speech,
) -> PreTrainedConfig:
    values = text.to_dict()
    section = values.pop(KEY)["section"]
    rope = {**values.pop("rope_parameters"), "mrope_section": section}
    text_class, vision_class = (config_class.sub_configs_defaults[f"{part}_config"] for part in ("text", "vision"))
    text_class, vision_class = (getattr(each, "config_class", each) for each in (text_class, vision_class))
    values = {key: value for key, value in values.items() if key != "model_type"}
    vision = {**facts(model.vision.config), family.width_key: text.hidden_size}
    plan = processor.geometry.video
    if "tokens_per_second" in vision and plan is not None and plan.positions_per_second:
        vision["tokens_per_second"] = int(plan.positions_per_second)
    if "deepstack_visual_indexes" in vision:
        vision["deepstack_visual_indexes"] = [
            block_index(level, model.vision.num_blocks) for level in model.vision.levels[: model.connector.num_levels]
        ]
    ids = {"image_token_id": speech.image_id}
    ids |= dict(zip(family.frame, speech.tokenizer.convert_tokens_to_ids(list(processor.geometry.frame))))
    if family.video is not None:
        ids["video_token_id"] = speech.video_id
    return config_class(
        text_config=text_class(**values, rope_parameters=rope).to_dict(),
        vision_config=vision_class(**vision).to_dict(),
        tie_word_embeddings=text.tie_word_embeddings,
        **ids,
    )


def _speech(processor: Processor, family: Family) -> Speech:
    """The tokenizer, with the tokens that the class's processor looks for, and the chat template."""
    token = getattr(processor.tokenizer, "image_token", None) or family.image_token
    if family.video is None:
        speech, names = typed_speech(processor, token), ("image_token", "image_start_token", "image_end_token")
        # its processor reads the tokens from the tokenizer
        speech.tokenizer._set_model_specific_special_tokens(dict(zip(names, (token, *processor.geometry.frame))))
        return speech
    video = getattr(processor.tokenizer, "video_token", None) or family.video_token
    return typed_speech(processor, token, video, framed_video=family.video.timestamps != "frame")


def _processor(vision: VisionEncoder, geometry: Geometry, family: Family, speech: Speech) -> ProcessorMixin:
    shape = {"patch_size": geometry.patch_size[0], "merge_size": vision.config.spatial_merge_size}
    look = {"image_mean": list(geometry.mean), "image_std": list(geometry.std)}
    least, most = geometry.image_pixels
    shape["temporal_patch_size"] = vision.config.temporal_patch_size
    limits = {"shortest_edge": least, "longest_edge": most}
    images = getattr(transformers, family.images_class)(**shape, **look, size=limits)
    parts = [images, speech.tokenizer]
    if family.video is not None:
        plan = geometry.video if family.video_difference(geometry.video) is None else family.video
        least, most = plan.pixels or plan.pixels_total
        frames = {"fps": plan.fps, "max_frames": plan.frames} if plan.fps else {"num_frames": plan.frames}
        frames |= {"min_frames": QWEN_LEAST, "do_sample_frames": True, "cap_pixels_per_frame": False}
        limits = {"shortest_edge": least, "longest_edge": most}
        parts.append(getattr(transformers, family.videos_class)(**shape, **look, **frames, size=limits))
    return getattr(transformers, family.processor_class)(*parts, chat_template=speech.template)
